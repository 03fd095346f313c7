"""A softmax that is normalised late gives the same numbers in whatever order they are read."""

import pytest
import torch

from hf_distill.functional.softmax import Softmax


def distribution(logits: torch.Tensor) -> Softmax:
    return Softmax(logits.clone(), torch.empty_like(logits))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(5, 11, generator=generator, dtype=torch.float64) + 40 for _ in range(2))


READ = {
    "probs": lambda p, q: p.probs,
    "log_probs": lambda p, q: p.log_probs,
    "log_prob": lambda p, q: p.log_prob(torch.tensor([[3, 7]] * 5)),
    "entropy": lambda p, q: p.entropy,
    "cross_entropy": lambda p, q: p.cross_entropy(q),
    "kl": lambda p, q: q.kl(p),
    "add_to_": lambda p, q: added(p),
}


def added(p: Softmax) -> torch.Tensor:
    pull = torch.ones(p.shape, dtype=torch.float64)
    p.add_to_(pull, -0.5)
    p.add_to_(pull, torch.arange(5.0, dtype=torch.float64)[:, None])
    return pull


def expected(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "probs": p,
        "log_probs": log_p,
        "log_prob": log_p[:, [3, 7]],
        "entropy": -(p * log_p).sum(1),
        "cross_entropy": -(p * log_q).sum(1),
        "kl": (q * (log_q - log_p)).sum(1),
        "add_to_": 1 + (torch.arange(5.0, dtype=torch.float64)[:, None] - 0.5) * p,
    }


@pytest.mark.parametrize("first", READ)
@pytest.mark.parametrize("second", READ)
def test_reading_one_number_leaves_the_others_what_they_are(first, second):
    a, b = pair()
    p, q = distribution(a), distribution(b)
    READ[first](p, q), READ[second](q, p)
    for name, value in expected(a, b).items():
        torch.testing.assert_close(READ[name](p, q), value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_another_temperature_is_that_of_the_logits_whatever_was_read_before(read, temperature):
    a, b = pair()
    p = distribution(a)
    READ[read](p, distribution(b))
    warm = p.at_(temperature, torch.empty_like(a))
    torch.testing.assert_close(warm.probs, (a / temperature).softmax(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(warm.log_probs, (a / temperature).log_softmax(1), rtol=1e-10, atol=1e-12)


def test_probabilities_can_be_scaled_before_and_after_they_were_read_and_after_another_temperature():
    a, _ = pair()
    for read in (False, True):
        p = distribution(a)
        if read:
            assert p.probs.shape == a.shape
        p.at_(2.0, torch.empty_like(a))
        torch.testing.assert_close(p.scaled_(0.3), 0.3 * a.softmax(1), rtol=1e-10, atol=1e-12)


def test_one_that_is_normalised_already_gives_the_same():
    a, b = pair()
    p, q = Softmax.of(a.log_softmax(1), a.softmax(1)), distribution(b)
    for name, value in expected(a, b).items():
        torch.testing.assert_close(READ[name](p, q), value, rtol=1e-10, atol=1e-12, msg=name)


def test_equal_distributions_are_exactly_0_apart():
    a, _ = pair()
    assert not distribution(a.float()).kl(distribution(a.float())).any()


def test_a_known_maximum_is_taken_and_a_shifted_block_is_not_shifted_again():
    a, _ = pair()
    top = a.amax(1, keepdim=True)
    torch.testing.assert_close(Softmax(a.clone(), torch.empty_like(a), top).probs, a.softmax(1))
    shifted = Softmax(a - top, torch.empty_like(a), shifted=True)
    torch.testing.assert_close(shifted.log_probs, a.log_softmax(1))
