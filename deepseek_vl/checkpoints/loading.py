"""Loading a model's weights and special tokens from a checkpoint, as every class of models does."""

import os
import threading
from collections.abc import Mapping
from typing import Any

from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel

from deepseek_vl.checkpoints.find import find_checkpoint, given_name, take_hub_arguments
from deepseek_vl.checkpoints.names import as_reference
from deepseek_vl.checkpoints.read import unread_weights
from deepseek_vl.checkpoints.special_tokens import checkpoint_special_tokens, image_token_id

_loading = threading.RLock()
"""Held while a model is built: transformers changes PyTorch's default dtype for the whole process meanwhile, and two
threads that do so at once leave it changed."""


class CheckpointModel(PreTrainedModel):
    """A model that is loaded strictly, from a directory, the Hub, or by the name of a bundled model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained`, strict: every weight comes from the checkpoint, and no weight is left over.

        Also takes the name of a bundled model. Special tokens are the checkpoint's own.

        Raises:
            OSError: see `find_checkpoint`.
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape (unless
                `ignore_mismatched_sizes` is given).
        """
        given, path = pretrained_model_name_or_path, None
        if given is not None:
            path = find_checkpoint(given, take_hub_arguments(kwargs))
        return_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        with _loading:
            loaded: Any = super().from_pretrained(
                path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **kwargs,
            )
        model, info = loaded
        checked = ["missing_keys", "unexpected_keys"] + ([] if ignore_mismatched_sizes else ["mismatched_keys"])
        problems = {kind: sorted(map(str, info.get(kind) or ())) for kind in checked}
        if any(problems.values()):
            details = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in problems.items() if keys)
            raise ValueError(f"The weights at {path!r} do not fit the config: {details}.")
        if given is not None and path is not None:
            model.config.name_or_path = given_name(given)  # what an adapter notes as its base
            if getattr(model.config, "image_token_id", None) is None:  # trainers of other libraries look for it there
                model.config.image_token_id = image_token_id(path)
            if model.can_generate():
                model.set_special_tokens(checkpoint_special_tokens(path, model.config.get_text_config()))
        model.after_loading()
        return (model, info) if return_info else model

    def after_loading(self) -> None:
        """Called when the weights are loaded; a subclass completes the model here."""

    @staticmethod
    def _load_pretrained_model(
        model: "CheckpointModel",
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
    ) -> Any:
        """transformers' step that fills a model, from tensors that are renamed for the model and read one by one.

        transformers would map whole files, whose pages stay in memory beside the weights that are converted from them.
        The method is private. `from_pretrained`'s `key_mapping` would replace it if it could also divide tensors by
        rows, and if transformers released the files' pages as it reads them.
        """
        devices = set((load_config.device_map or {"": "cpu"}).values())
        # transformers itself reads weights that stay on the disk or are divided among DeepSpeed's processes.
        if state_dict is None and checkpoint_files and "disk" not in devices and not is_deepspeed_zero3_enabled():
            dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
            is_for_cpu = all(str(device) == "cpu" for device in devices) and not load_config.is_quantized
            # Weights for a CPU are converted as they are read, to copy them only once; others on their own device.
            dtype = dtypes.pop() if is_for_cpu and len(dtypes) == 1 else None
            state_dict = unread_weights(checkpoint_files, dtype)
        if state_dict:
            state_dict = model.own_names(state_dict)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)

    def own_names(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's tensors, in either layout, under the names that this class has for them."""
        return as_reference(tensors, self.state_dict())

    def set_special_tokens(self, token_ids: Mapping[str, int]) -> None:
        """Tell `generate`, here and in a language model that has its own, which tokens begin, end and pad a text."""
        for module in self.modules():
            if isinstance(module, GenerationMixin):
                for name, token_id in token_ids.items():
                    setattr(module.generation_config, name, token_id)
