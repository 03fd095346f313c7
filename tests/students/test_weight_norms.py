from __future__ import annotations

import pytest
import torch

from hf_distill.students.weight_norms import weight_norms
from tests.students.twins import build


def norm(*rows: torch.Tensor) -> torch.Tensor:
    """Norms of the rows of matrices side by side."""
    return torch.cat(rows, dim=1).norm(dim=1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_scores_are_the_norms_of_the_rows_and_columns_of_each_part(family):
    model = build(family, layers=2)
    scores = weight_norms(model)
    if family == "gpt2":
        layer = model.transformer.h[1]
        torch.testing.assert_close(scores.mlp[1], norm(layer.mlp.c_fc.weight.T, layer.mlp.c_proj.weight).detach())
        assert scores.heads is scores.hidden is scores.layers is None
        return
    layer = model.model.layers[1]
    mlp, attention = layer.mlp, layer.self_attn
    gate, up = mlp.gate_up_proj.weight.chunk(2) if family == "phi3" else (mlp.gate_proj.weight, mlp.up_proj.weight)
    query = attention.qkv_proj.weight[:32] if family == "phi3" else attention.q_proj.weight
    heads = norm(query.reshape(4, -1), attention.o_proj.weight.T.reshape(4, -1))
    torch.testing.assert_close(scores.mlp[1], norm(gate, up, mlp.down_proj.weight.T).detach())
    torch.testing.assert_close(scores.heads[1], heads.detach())
    reads = [weight.T for name, weight in model.named_parameters() if name.endswith(READS)]
    writes = [
        weight for name, weight in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    torch.testing.assert_close(scores.hidden, norm(*reads, *writes).detach())
    assert set(scores.provenance) == {"mlp", "heads", "hidden"}


READS = tuple(f"{name}.weight" for name in ["embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "qkv_proj"])
READS += tuple(f"{name}.weight" for name in ["gate_proj", "up_proj", "gate_up_proj"])
