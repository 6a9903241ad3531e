"""The configs: their arguments, their attributes, and the `config.json` that they write."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, ROOT, small_config
from transformers import AutoConfig, LlamaConfig

from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.modeling_vlm import AlignerConfig, VisionConfig
from deepseek_vl.models.projector import MlpProjector

SECTIONS = ("vision_config", "aligner_config", "language_config")


@pytest.fixture(params=["1.3b", "7b"])
def published(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The sections of a published `config.json`."""
    return json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))[request.param]


# --- cls and params ---


@pytest.mark.parametrize(
    ("config_class", "cls"),
    [(VisionConfig, CLIPVisionTower), (VisionConfig, HybridVisionTower), (AlignerConfig, MlpProjector)],
)
def test_cls_may_be_a_class_whose_name_is_kept(config_class, cls):
    assert config_class(cls=cls).cls == cls.__name__
    assert config_class(cls=cls.__name__).cls == cls.__name__


@pytest.mark.parametrize("config_class", [VisionConfig, AlignerConfig])
def test_cls_and_params_may_be_left_out(config_class):
    config = config_class()
    assert config.cls == ""
    assert dict(config.params) == {}


def saved_and_loaded(config: MultiModalityConfig, tmp_path: Path) -> MultiModalityConfig:
    config.save_pretrained(tmp_path)
    return MultiModalityConfig.from_pretrained(tmp_path)


COPIES = {
    "as made": lambda config, tmp_path: config,
    "saved and loaded": saved_and_loaded,
    "deep-copied": lambda config, tmp_path: copy.deepcopy(config),
    "pickled": lambda config, tmp_path: pickle.loads(pickle.dumps(config)),
    "through a dict": lambda config, tmp_path: MultiModalityConfig.from_dict(config.to_dict()),
}


@pytest.mark.parametrize("how", COPIES)
def test_params_answer_by_attribute_and_by_item(how, tmp_path):
    config = COPIES[how](small_config("hybrid", 100), tmp_path)
    vision, aligner = config.vision_config.params, config.aligner_config.params
    assert vision.concat_type == vision["concat_type"] == "tuple"
    assert vision.high_res_cfg.image_size == vision["high_res_cfg"]["image_size"] == 64
    assert list(vision.low_res_cfg.pixel_mean) == list(vision["low_res_cfg"]["pixel_mean"]) == [0.5, 0.5, 0.5]
    assert aligner.n_embed == aligner["n_embed"] == aligner.get("n_embed") == 64
    assert aligner.get("absent", 3) == 3
    with pytest.raises(AttributeError):
        _ = aligner.absent
    with pytest.raises(KeyError):
        aligner["absent"]
    assert (config.vision_config.cls, config.aligner_config.cls) == ("HybridVisionTower", "MlpProjector")


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_config_builds_the_same_network(how, tmp_path):
    original = small_config("hybrid", 100)
    config = COPIES[how](original, tmp_path)
    with torch.device("meta"):
        expected, state = (MultiModalityCausalLM(c).state_dict() for c in (original, config))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}


# --- sub-configs ---


def test_sub_configs_may_be_dicts_or_objects(published):
    from_dicts = MultiModalityConfig(**published)
    objects = {
        "vision_config": VisionConfig(**published["vision_config"]),
        "aligner_config": AlignerConfig(**published["aligner_config"]),
        "language_config": LlamaConfig(**published["language_config"]),
    }
    from_objects = MultiModalityConfig(**objects)
    for name, expected_class in zip(SECTIONS, (VisionConfig, AlignerConfig, LlamaConfig), strict=True):
        assert getattr(from_objects, name) is objects[name]
        assert type(getattr(from_dicts, name)) is expected_class
        assert getattr(from_dicts, name).to_dict() == objects[name].to_dict()


def test_a_dict_given_as_a_sub_config_is_not_changed(published):
    given = copy.deepcopy(published)
    MultiModalityConfig(**given)
    assert given == published


def test_missing_language_keys_take_llama_s_defaults():
    """The defaults are those of transformers 4.38, for which the checkpoints were published."""
    language = MultiModalityConfig(language_config={"vocab_size": 102400}).language_config
    assert language.vocab_size == 102400
    assert language.hidden_size == 4096
    assert language.intermediate_size == 11008
    assert language.num_hidden_layers == 32
    assert language.num_attention_heads == 32
    assert language.num_key_value_heads == 32
    assert language.hidden_act == "silu"
    assert language.rms_norm_eps == 1e-6
    assert language.attention_bias is False
    assert language.tie_word_embeddings is False
    assert (language.bos_token_id, language.eos_token_id) == (1, 2)
    assert rope_theta(language) == 10000.0


def rope_theta(config: LlamaConfig) -> float:
    """A config's `rope_theta`, which transformers 5 keeps in `rope_parameters`."""
    return getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]


def test_key_value_heads_follow_the_attention_heads():
    language = MultiModalityConfig(language_config={"num_attention_heads": 16, "hidden_size": 2048}).language_config
    assert language.num_key_value_heads == 16
    assert language.head_dim == 128


def test_rope_theta_can_be_given_as_in_older_files(tmp_path):
    config = MultiModalityConfig(language_config={"rope_theta": 500000.0})
    assert rope_theta(config.language_config) == 500000.0
    assert rope_theta(saved_and_loaded(config, tmp_path).language_config) == 500000.0


def test_a_config_without_arguments_has_all_three_parts():
    config = MultiModalityConfig()
    assert isinstance(config.vision_config, VisionConfig)
    assert isinstance(config.aligner_config, AlignerConfig)
    assert isinstance(config.language_config, LlamaConfig)


@pytest.mark.parametrize("section", ["vision_config", "aligner_config"])
@pytest.mark.parametrize("cls", ["EVATower", ""])
def test_an_unknown_cls_is_an_error_when_the_model_is_built(section, cls):
    config = small_config("siglip", 100)
    getattr(config, section).cls = cls
    with pytest.raises(ValueError, match=f"'{cls}'"), torch.device("meta"):
        MultiModalityCausalLM(config)


@pytest.mark.parametrize(
    "cls", ["CLIPVisionTower", "deepseek_vl.models.clip_encoder.CLIPVisionTower", "MyCLIPVisionTower2"]
)
def test_cls_is_matched_as_a_substring(cls):
    config = small_config("siglip", 100)
    config.vision_config.cls = cls
    with torch.device("meta"):
        assert type(MultiModalityCausalLM(config).vision_model) is CLIPVisionTower


# --- what transformers asks for ---


def test_base_model_prefix_and_text_config():
    config = small_config("siglip", 100)
    assert MultiModalityCausalLM.base_model_prefix == "multi_modality"
    assert MultiModalityCausalLM.config_class is MultiModalityConfig
    assert config.get_text_config() is config.language_config


@pytest.mark.parametrize(
    ("model_type", "config_class"),
    [("multi_modality", MultiModalityConfig), ("vision", VisionConfig), ("aligner", AlignerConfig)],
)
def test_auto_config_knows_the_types(model_type, config_class, tmp_path):
    assert config_class.model_type == model_type
    assert type(AutoConfig.for_model(model_type)) is config_class
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class


def test_auto_config_reads_a_published_config(published, tmp_path):
    whole = {"architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality", **published}
    (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MultiModalityConfig
    assert config.vision_config.cls == published["vision_config"]["cls"]
    assert config.aligner_config.params.n_embed == published["aligner_config"]["params"]["n_embed"]
    assert config.language_config.num_hidden_layers == published["language_config"]["num_hidden_layers"]
    assert config.language_config.dtype == torch.float16


@pytest.mark.parametrize("times", [1, 2])
def test_save_pretrained_writes_the_published_sections(published, times, tmp_path):
    config = MultiModalityConfig(**published)
    for _ in range(times):  # a loaded config writes the same file again
        config = saved_and_loaded(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in SECTIONS} == published
    assert written["model_type"] == "multi_modality"
    assert written["architectures"] == ["MultiModalityCausalLM"]


# --- importing ---


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )


def test_attrdict_is_importable_and_collections_is_left_as_it_was():
    done = run_python(
        "import collections, collections.abc; before = set(dir(collections))\n"
        "import deepseek_vl\n"
        "assert set(dir(collections)) == before, set(dir(collections)) ^ before\n"
        "from attrdict import AttrDict\n"
        "assert AttrDict({'a': {'b': 1}}).a.b == 1\n"
        "assert not hasattr(collections, 'Mapping')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_is_silent_and_reloading_does_not_raise():
    done = run_python(
        "import importlib, sys\n"
        "import deepseek_vl.models\n"
        "names = [name for name in sys.modules if name.startswith('deepseek_vl')]\n"
        "for name in names: importlib.reload(sys.modules[name])\n"
        "for name in names: del sys.modules[name]\n"
        "from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "assert type(AutoConfig.for_model('multi_modality')) is MultiModalityConfig\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
