from __future__ import annotations

import pytest

from hf_distill import KDConfig, KDSFTConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "foward_kl"}, "forward_kl"),
        ({"divergence": "jsd", "divergence_kwargs": {"beta": 2.0}}, "beta"),
        ({"divergence": "jsd", "divergence_kwargs": '{"gamma": 1}'}, "gamma"),
        ({"divergence": "taid", "divergence_kwargs": {"alpha": "fast"}}, "`divergence_kwargs` is .*'fast'"),
        ({"ce_weight": -0.1}, "ce_weight"),
        ({"kd_weight": float("nan")}, "kd_weight"),
        ({"ce_weight": 0, "kd_weight": 0}, "all 0"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"metric_for_best_model": "kl", "greater_is_better": True}, "lower is better"),
    ],
)
@pytest.mark.parametrize("config", [KDConfig, KDSFTConfig])
def test_a_wrong_field_is_refused_by_name(config, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_sft_refuses_a_loss_type_that_it_would_ignore(tmp_path):
    with pytest.raises(ValueError, match="loss_type"):
        KDSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type="dft")


@pytest.mark.parametrize("config", [KDConfig, KDSFTConfig])
def test_the_best_model_is_chosen_by_the_metric_that_knows_no_temperature(config, tmp_path):
    args = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("kl", False)
    assert (
        config(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model="eval_student_nll"
        ).greater_is_better
        is False
    )


def test_divergence_kwargs_may_be_json(tmp_path):
    args = KDConfig(str(tmp_path), use_cpu=True, divergence="jsd", divergence_kwargs='{"beta": 0.25}')
    assert args.divergence_kwargs == {"beta": 0.25}
