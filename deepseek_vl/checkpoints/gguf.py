"""Exporting a checkpoint as llama.cpp's two files: the language model, and the vision tower with its projector.

llama.cpp runs DeepSeek-VL's smaller size as a Llama with the vision half of `janus_pro`, which is the same network: a
SigLIP and two linear layers. It cannot run the larger size's hybrid tower.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig

from deepseek_vl.checkpoints import layout_configs as configs
from deepseek_vl.checkpoints.convert import (
    CONFIG,
    IMAGES,
    PROCESSOR,
    Architecture,
    check_places,
    check_weights,
    weight_files,
)
from deepseek_vl.checkpoints.find import find_checkpoint, read_json
from deepseek_vl.checkpoints.names import as_reference
from deepseek_vl.checkpoints.read import unread_weights
from deepseek_vl.checkpoints.special_tokens import checkpoint_special_tokens
from deepseek_vl.checkpoints.tensors import Slice, shape_of
from deepseek_vl.checkpoints.write import appearing_whole

logger = logging.getLogger(__name__)

LANGUAGE = {
    # The reference's: llama.cpp's. `*` is a layer's number, `@` is weight or bias.
    "language_model.model.embed_tokens.weight": "token_embd.weight",
    "language_model.model.norm.weight": "output_norm.weight",
    "language_model.lm_head.weight": "output.weight",
    "language_model.model.layers.*.self_attn.q_proj.weight": "blk.*.attn_q.weight",
    "language_model.model.layers.*.self_attn.k_proj.weight": "blk.*.attn_k.weight",
    "language_model.model.layers.*.self_attn.v_proj.weight": "blk.*.attn_v.weight",
    "language_model.model.layers.*.self_attn.o_proj.weight": "blk.*.attn_output.weight",
    "language_model.model.layers.*.mlp.gate_proj.weight": "blk.*.ffn_gate.weight",
    "language_model.model.layers.*.mlp.up_proj.weight": "blk.*.ffn_up.weight",
    "language_model.model.layers.*.mlp.down_proj.weight": "blk.*.ffn_down.weight",
    "language_model.model.layers.*.input_layernorm.weight": "blk.*.attn_norm.weight",
    "language_model.model.layers.*.post_attention_layernorm.weight": "blk.*.ffn_norm.weight",
}
VISION = {
    "vision_model.vision_tower.pos_embed": "v.position_embd.weight",
    "vision_model.vision_tower.patch_embed.proj.@": "v.patch_embd.@",
    "vision_model.vision_tower.blocks.*.norm1.@": "v.blk.*.ln1.@",
    "vision_model.vision_tower.blocks.*.attn.qkv.@": "v.blk.*.attn_[q,k,v].@",  # three tensors, from the rows of one
    "vision_model.vision_tower.blocks.*.attn.proj.@": "v.blk.*.attn_out.@",
    "vision_model.vision_tower.blocks.*.norm2.@": "v.blk.*.ln2.@",
    "vision_model.vision_tower.blocks.*.mlp.fc1.@": "v.blk.*.ffn_up.@",
    "vision_model.vision_tower.blocks.*.mlp.fc2.@": "v.blk.*.ffn_down.@",
    "vision_model.vision_tower.norm.@": "v.post_ln.@",
    "aligner.layers.0.@": "mm.0.@",
    "aligner.layers.2.@": "mm.1.@",
}
"""The weights of the tower's pooling head are left out, because the forward pass does not use them."""

PRE_TOKENIZER = "deepseek-coder"
PRE_TOKENIZER_HASH = "5209debba4ff"
"""The hash of the published tokenizer's rules for splitting a text before its merges. llama.cpp calls these rules
`PRE_TOKENIZER`; those that it calls `deepseek-llm` are others."""


def export(
    source: str | Path,
    destination: str | Path,
    architecture: Architecture,
    file_type: str = "f16",
    language_only: bool = False,
) -> int:
    """Write `model-TYPE.gguf` and `mmproj-f16.gguf`, tensor by tensor, and read them back to compare.

    `destination` appears when it is complete.

    Args:
        source: a checkpoint's directory in either layout, the name of a bundled model, or an id on the Hub.
        destination: a directory that does not exist yet.
        architecture: of the model.
        file_type: of the language model's matrices, one of `GGUF_TYPES`. The rest of it is float32, the vision tower's
            matrices float16.
        language_only: leave out the vision tower.

    Returns:
        How many tensors were written.

    Raises:
        FileExistsError: if there is something at `destination`.
        OSError: if the source's files are missing or broken, or the new ones cannot be written.
        ValueError: for what llama.cpp cannot run, for numbers that float16 does not hold, if the source lacks weights,
            and if what was read back is not what was written.
    """
    name = Path(source).resolve().name  # a Hub id's last part; its files are under a revision's hash
    source, destination = Path(find_checkpoint(source)), Path(destination)
    check_places(source, destination)
    checkpoint = _read(name, source, architecture)
    files = {f"model-{file_type}.gguf": _language_file(checkpoint, file_type)}
    if not language_only:
        files["mmproj-f16.gguf"] = _vision_file(checkpoint, architecture.tower_fields)
    with appearing_whole(destination) as unfinished:
        for file, content in files.items():
            content.write(unfinished / file)
    return sum(len(content.tensors) for content in files.values())


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint to export.

    Attributes:
        name: the last part of its path, or of its id on the Hub.
        config, images: the model's and its image processor's settings, in the reference's layout.
        language: the language model's settings, with transformers' defaults for what `config` leaves out.
        tokenizer: `tokenizer.json`.
        special_tokens: the ids that begin, end and pad a text, see `checkpoint_special_tokens`.
        chat_template: Jinja.
        tensors: by the reference's names.
    """

    name: str
    config: Mapping[str, Any]
    images: Mapping[str, Any]
    language: LlamaConfig
    tokenizer: Mapping[str, Any]
    special_tokens: Mapping[str, Any]
    chat_template: str
    tensors: Mapping[str, Slice | torch.Tensor]


def _read(name: str, source: Path, architecture: Architecture) -> _Checkpoint:
    config, images, processor = (read_json(source / file) for file in (CONFIG, IMAGES, PROCESSOR))
    images = images or processor.get("image_processor", {})
    if configs.is_transformers(config):
        config = configs.to_reference(config, images, architecture.tower_fields)
        images = configs.images_to_reference(images)
    model = architecture.weights(config)
    tensors = as_reference(unread_weights(weight_files(source)), model)
    check_weights(source, model, tensors, tensors.keys() - model.keys())
    language = LlamaConfig(**config["language_config"])
    return _Checkpoint(
        name,
        config,
        {**configs.IMAGE_DEFAULTS, **images},
        language,
        read_json(source / "tokenizer.json"),
        checkpoint_special_tokens(source, language),
        # llama.cpp adds the begin token itself, and not every reader of these files knows the tags of what is learnt.
        re.sub(r"{%- (end)?generation -%}|{{- bos_token -}}", "", architecture.chat_template),
        {name: tensors[name] for name in model},  # in the network's order, not the files'
    )


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a GGUF file: its source, how it is made from that, and the type it is stored as."""

    source: Slice | torch.Tensor
    shape: list[int]
    change: Callable[[torch.Tensor], torch.Tensor]
    kind: gguf.GGMLQuantizationType

    def stored(self, name: str) -> np.ndarray:
        """The tensor's numbers as the file has them; a ValueError if float16 cannot hold them."""
        numbers = self.change(self.source[...].float()).reshape(self.shape).contiguous().numpy()
        with np.errstate(over="ignore"):
            stored = gguf.quants.quantize(numbers, self.kind)
        if self.kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(stored).all():
            raise ValueError(f"{name} has numbers that float16 does not hold; choose --type bf16.")
        return stored


@dataclass(frozen=True)
class _File:
    """A file to be written: its architecture's name, the function that writes its metadata, and its tensors by name."""

    architecture: str
    say: Callable[[gguf.GGUFWriter], None]
    tensors: Mapping[str, _Tensor]

    def write(self, path: Path) -> None:
        """Write the file, and read it back to compare."""
        writer = gguf.GGUFWriter(path, self.architecture)
        try:
            self.say(writer)
            for name, tensor in self.tensors.items():
                shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
                # The library wants a dtype as well, and ignores it.
                size = math.prod(shape)
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float16), size, tensor.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            digests = {}
            for name, tensor in tqdm(self.tensors.items(), desc=path.name, unit="tensor", disable=None):
                stored = tensor.stored(name)
                digests[name] = hashlib.sha256(stored.tobytes()).digest()
                writer.write_tensor_data(stored)
            writer.flush()
        finally:
            writer.close()
        self._compare(path, digests)

    def _compare(self, path: Path, digests: Mapping[str, bytes]) -> None:
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, tensor in self.tensors.items():
            found = read.pop(name, None)
            is_same = (
                found is not None
                and found.tensor_type == tensor.kind
                and list(map(int, found.shape)) == tensor.shape[::-1]
                and hashlib.sha256(found.data.tobytes()).digest() == digests[name]
            )
            if not is_same:
                raise ValueError(f"{name} is not what was written; the disk may be faulty. Nothing was written.")
        if read:
            raise ValueError(f"{path.name} has tensors that were not written: {', '.join(read)}. Nothing was written.")


def _language_file(checkpoint: _Checkpoint, file_type: str) -> _File:
    config = checkpoint.language
    heads: int = config.num_attention_heads
    key_heads: Any = config.num_key_value_heads  # transformers fills both in
    head_dim: Any = config.head_dim
    theta, factor = _rotation(config)
    kind = gguf.GGMLQuantizationType[file_type.upper()]

    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(checkpoint.name)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"])
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(key_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(theta)
        if factor is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        _say_tokenizer(writer, checkpoint, config.vocab_size)

    def change(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if name.endswith("attn_q.weight") else key_heads
            # llama.cpp rotates neighbouring numbers, transformers one half of a head with the other.
            return lambda x: x.view(count, 2, head_dim // 2, -1).transpose(1, 2)
        return lambda x: x

    tensors = {}
    for name, (source, shape) in _renamed(checkpoint.tensors, LANGUAGE).items():
        # Embedding and output are more sensitive to 4 bits than the other matrices.
        wanted = gguf.GGMLQuantizationType.Q8_0 if name in _ENDS and file_type == "q4_0" else kind
        tensors[name] = _Tensor(source, shape, change(name), _kind(shape, wanted))
    return _File("llama", say, tensors)


_ENDS = ("token_embd.weight", "output.weight")


def _rotation(config: LlamaConfig) -> tuple[float, float | None]:
    """The rotary embedding's base, and the number that positions are divided by, or None.

    Raises:
        ValueError: for a scaling that is not exported.
    """
    rotation: Any = config.rope_parameters  # transformers fills it in
    kind = rotation["rope_type"]
    if kind not in ("default", "linear"):
        raise ValueError(f"Rotary embeddings scaled by {kind!r} are not exported, only 'linear' ones.")
    return float(rotation["rope_theta"]), float(rotation["factor"]) if kind == "linear" else None


def _say_tokenizer(writer: gguf.GGUFWriter, checkpoint: _Checkpoint, size: int) -> None:
    model = checkpoint.tokenizer.get("model", {})
    if model.get("type") != "BPE" or not model.get("merges"):
        raise ValueError("Only a tokenizer of byte pairs (BPE) in a tokenizer.json is exported.")
    rules = json.dumps([checkpoint.tokenizer.get("normalizer"), checkpoint.tokenizer.get("pre_tokenizer")])
    if hashlib.sha256(rules.encode()).hexdigest()[:12] != PRE_TOKENIZER_HASH:
        logger.warning(
            "This tokenizer splits texts by other rules than the published one, which llama.cpp does not have: some "
            "words will become other tokens there. Prompts that are given as token ids are not affected."
        )
    tokens = {number: token for token, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for token in checkpoint.tokenizer.get("added_tokens", ()):
        tokens[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    for key, say in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        number = checkpoint.special_tokens.get(key)
        if number is not None:
            say(number[0] if isinstance(number, list) else number)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(checkpoint.chat_template)


def _vision_file(checkpoint: _Checkpoint, tower_fields: configs.TowerFields) -> _File:
    renamed = _renamed(checkpoint.tensors, VISION)
    if "v.patch_embd.weight" not in renamed:
        raise ValueError(
            "llama.cpp has no place for this vision tower: it runs a SigLIP alone, not the hybrid of the larger size. "
            "--language_only writes the language model without it."
        )
    problem = _vision_problem(checkpoint)
    if problem:
        raise ValueError(f"llama.cpp cannot run this vision tower: {problem}. --language_only leaves it out.")
    width, _, patch, _ = renamed["v.patch_embd.weight"][1]
    layers = 1 + max(int(found[1]) for found in map(re.compile(r"v\.blk\.(\d+)\.").match, renamed) if found)
    heads = tower_fields(checkpoint.config["vision_config"]["params"])["heads"]
    mean, std = checkpoint.images["image_mean"], checkpoint.images["image_std"]
    if not checkpoint.images.get("do_normalize", True) or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def say(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name(checkpoint.name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type(gguf.VisionProjectorType.JANUS_PRO)
        writer.add_vision_projection_dim(renamed["mm.1.weight"][1][0])
        writer.add_vision_image_size(checkpoint.images["image_size"])
        writer.add_vision_patch_size(patch)
        writer.add_vision_embedding_length(width)
        writer.add_vision_feed_forward_length(renamed["v.blk.0.ffn_up.weight"][1][0])
        writer.add_vision_block_count(layers)
        writer.add_vision_head_count(heads)
        writer.add_vision_attention_layernorm_eps(1e-6)
        writer.add_vision_use_gelu(True)
        writer.add_vision_image_mean(mean)
        writer.add_vision_image_std(std)

    tensors = {}
    for name, (source, shape) in renamed.items():
        if name == "v.position_embd.weight":
            tensors[name] = _Tensor(source, shape[1:], lambda x: x, gguf.GGMLQuantizationType.F32)
            continue
        parts = re.search(r"\[(.*)\]", name)
        letters = parts[1].split(",") if parts else [""]
        rows = shape[0] // len(letters)
        for i, letter in enumerate(letters):
            part = name.replace(parts[0], letter) if parts else name
            kind = _kind([rows, *shape[1:]], gguf.GGMLQuantizationType.F16)
            tensors[part] = _Tensor(source, [rows, *shape[1:]], _rows(i * rows, rows), kind)
    return _File("clip", say, tensors)


def _vision_problem(checkpoint: _Checkpoint) -> str:
    """Why llama.cpp cannot run a SigLIP tower; empty if it can."""
    aligner = checkpoint.config.get("aligner_config", {}).get("params", {})
    vision = checkpoint.config["vision_config"].get("params", {})
    kind, depth = aligner.get("projector_type"), aligner.get("depth", 1)
    if (kind, depth) != ("mlp_gelu", 2):
        return f"it wants a projector of two layers with a GELU between, not {kind!r} of depth {depth}"
    if vision.get("pixel_mean") is not None and vision.get("pixel_std") is not None:
        return "it normalises pixels before the tower, not inside"
    if abs(checkpoint.images["rescale_factor"] - 1 / 255) > 1e-9:
        return "it divides pixels by 255"
    return ""


def _rows(start: int, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x[start : start + count]


def _kind(shape: list[int], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """The type a tensor is stored as: float32 for vectors, else the wanted one, or float16 if its blocks do not fit."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _renamed(
    tensors: Mapping[str, Slice | torch.Tensor], names: Mapping[str, str]
) -> dict[str, tuple[Slice | torch.Tensor, list[int]]]:
    """The tensors whose names a table has, under llama.cpp's names, with their shapes."""
    found = {}
    for name, tensor in tensors.items():
        layer = re.search(r"(?:layers|blocks)\.(\d+)\.[a-z]", name)
        number, ending = layer[1] if layer else "", name.rpartition(".")[2]
        pattern = name.replace(f".{number}.", ".*.", 1)
        for key in (pattern, pattern.removesuffix(ending) + "@", name.removesuffix(ending) + "@"):
            if key in names:
                found[names[key].replace("*", number).replace("@", ending)] = tensor, shape_of(tensor)
                break
    return found
