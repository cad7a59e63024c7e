"""A Gemma 4 target gets a drafter with Gemma 4's own layers, which learns and can be read again."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from cluster.errors import ConfigError
from cluster.models.checkpoint import load_drafter
from cluster.models.eagle3_checkpoint import load_eagle3
from cluster.training.dataset import Batch
from cluster.training.features import FeatureTarget
from cluster.training.methods import build_method
from tests.training_tools import LENGTH, make_config


@pytest.fixture
def target() -> Gemma4ForCausalLM:
    torch.manual_seed(0)
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_global_key_value_heads=1,
            head_dim=4,
            global_head_dim=8,
            attention_k_eq_v=True,
            final_logit_softcapping=20.0,
            hidden_size_per_layer_input=0,
            max_position_embeddings=128,
            sliding_window=16,
            initializer_range=0.3,
        )
    ).eval()


@pytest.mark.parametrize("method", ["dspark", "dflash", "eagle3"])
def test_drafter_has_gemma4_layers_and_learns(method, target, tmp_path):
    mask = {} if method == "eagle3" else {"mask_token_id": 3}
    config = make_config(tmp_path, drafter={"method": method, **mask})
    training = build_method(config, target, SimpleNamespace(mask_token_id=None))
    shape = training.network.config
    assert shape.architecture.startswith("Gemma4")
    assert (shape.num_key_value_heads, shape.head_dim) == (1, 8)
    assert (shape.attention_k_eq_v, shape.final_logit_softcapping) == (True, 20.0)
    assert shape.rope_parameters["rope_type"] == "proportional"

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(60, (2, LENGTH), generator=generator)
    features, logits = FeatureTarget(target, training.target_layer_ids).run(tokens)
    batch = training.sample(Batch(tokens, None, (0, 1)), generator)
    optimizer = torch.optim.SGD(
        [value for value in training.network.parameters() if value.requires_grad], lr=0.02
    )
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = training.loss(batch, features, logits).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    training.save(tmp_path / "saved")
    load = load_eagle3 if method == "eagle3" else load_drafter
    assert load(tmp_path / "saved").config == shape


def test_gemma4_has_no_reduced_vocabulary(target, tmp_path):
    config = make_config(tmp_path, drafter={"method": "eagle3", "draft_vocab_size": 30})
    with pytest.raises(ConfigError) as caught:
        build_method(config, target, SimpleNamespace(mask_token_id=None))
    assert caught.value.key == "drafter.draft_vocab_size"
