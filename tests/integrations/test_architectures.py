"""One step on networks of many families: what is measured is the batch's curvature, exactly."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.options import measuring
from torch import nn

from adler import Adler

transformers = pytest.importorskip("transformers")

VERSIONS = ["transformers"]
WORDS = 64
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {"vocab_size": WORDS, **SMALL}
GROUPED = {**TEXT, "num_key_value_heads": 2}
PICTURES = {"image_size": 32, "patch_size": 8, **SMALL}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONVOLVED = {"patch_sizes": [3, 3], "strides": [2, 2], "num_encoder_blocks": 2}
# By name of the model: name of its configuration, and what that is given.
LANGUAGE = {
    "GPT2LMHeadModel": {
        "vocab_size": WORDS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "GemmaForCausalLM": {**GROUPED, "head_dim": 8},
    "PhiForCausalLM": TEXT,
    "GPTNeoXForCausalLM": TEXT,
    "OPTForCausalLM": {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "MambaForCausalLM": {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
    },
}
ENCODERS = {
    "BertForSequenceClassification": TEXT,
    "RobertaForSequenceClassification": TEXT,
    "DistilBertForSequenceClassification": {
        "vocab_size": WORDS,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
    },
    "AlbertForSequenceClassification": {**TEXT, "embedding_size": 16},
    "ElectraForSequenceClassification": {**TEXT, "embedding_size": 16},
    "DebertaV2ForSequenceClassification": {
        **TEXT,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
}
ENCODER_DECODERS = {
    "T5ForConditionalGeneration": {
        "vocab_size": WORDS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    },
    "BartForConditionalGeneration": {
        "vocab_size": WORDS,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}
VISION = {
    "ViTForImageClassification": PICTURES,
    "DeiTForImageClassification": PICTURES,
    "BeitForImageClassification": {**PICTURES, "use_relative_position_bias": True},
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "ConvNextForImageClassification": {**STAGES, "num_stages": 2},
    "ResNetForImageClassification": {**STAGES, "embedding_size": 8},
    "MobileNetV2ForImageClassification": {"image_size": 32, "depth_multiplier": 0.35},
    "PoolFormerForImageClassification": {**STAGES, **CONVOLVED, "padding": [1, 1]},
    "SegformerForImageClassification": {
        **STAGES,
        **CONVOLVED,
        "sr_ratios": [2, 1],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
}
EXACT = {**LANGUAGE, **ENCODERS, **ENCODER_DECODERS, **VISION}
# (In bfloat16 MobileNetV2's gradient itself is off by its own norm at initialisation.)
UNDER_AUTOCAST = [name for name in EXACT if not name.startswith("MobileNet")]
# An op of these has no forward derivative: a function of their own, weight normalisation.
FALLING_BACK = {
    "BloomForCausalLM": {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Wav2Vec2ForSequenceClassification": {
        **SMALL,
        "conv_dim": (8, 8),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 16,
        "apply_spec_augment": False,
    },
}


def network(name):
    """As it comes: with the dropout of its family."""
    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**{**EXACT, **FALLING_BACK}[name])).train()


def arguments(name):
    """A batch; the first words are none, but marks such as padding's."""
    if name in VISION:
        return {"pixel_values": torch.randn(3, 3, 32, 32)}
    if name.startswith("Wav2Vec2"):
        return {"input_values": torch.randn(2, 400)}
    text = {"input_ids": torch.randint(3, WORDS, (3, 10))}
    if name in ENCODER_DECODERS:
        return {**text, "decoder_input_ids": torch.randint(3, WORDS, (3, 7))}
    return text


def stepped(name, dtype=torch.float64, autocast=False):
    """The optimizer after a step, and what it warned of."""
    model, criterion = network(name).to(dtype), nn.CrossEntropyLoss()
    given = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in arguments(name).items()
    }

    def scores(found):
        return found.logits.flatten(0, -2)

    optimizer = Adler(model.parameters(), model, criterion, output_fn=scores, **measuring())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = scores(model(**given))
        loss = criterion(outputs, torch.randint(outputs.shape[-1], outputs.shape[:1]))
    loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return optimizer, [str(w.message) for w in caught if "forward-mode AD" in str(w.message)]


@pytest.mark.row("Hugging Face families, exact engine", versions=VERSIONS)
@pytest.mark.parametrize("name", EXACT)
def test_the_measurement_is_exact(name):
    optimizer, warned = stepped(name)
    assert warned == []
    # (Some families take a norm or a product in float32 whatever the network's precision.)
    assert float(optimizer.last_step.consistency) == pytest.approx(1, abs=1e-6)
    assert float(optimizer.last_step.curvature) > 0


@pytest.mark.row("Hugging Face families, exact engine under autocast", versions=VERSIONS)
@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_under_autocast_it_is_near(name):
    optimizer, warned = stepped(name, torch.float32, autocast=True)
    assert warned == []
    # A bfloat16 has three digits.
    assert float(optimizer.last_step.consistency) == pytest.approx(1, abs=0.03)


@pytest.mark.row("Hugging Face families without a forward derivative", versions=VERSIONS)
@pytest.mark.parametrize("name", FALLING_BACK)
def test_where_forward_mode_cannot_go_one_warning_says_so(name):
    optimizer, warned = stepped(name)
    assert len(warned) == 1
    assert optimizer.measure.jvp == "finite_difference"
    assert float(optimizer.last_step.consistency) == pytest.approx(1, abs=1e-3)
