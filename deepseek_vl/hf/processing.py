"""Messages and images -> model inputs, with transformers' interface."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import ImageInput
from transformers.processing_utils import BatchFeature, ProcessingKwargs, ProcessorMixin

from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.checkpoints.layout_configs import IMAGE_TAG, require_transformers_processor
from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.hf.image_processing import DeepseekVLImageProcessor
from deepseek_vl.models.image_processing_vlm import flat_images
from deepseek_vl.models.processing_vlm import VLChatProcessor
from deepseek_vl.utils.conversation import DEEPSEEK_CHAT_TEMPLATE


class _Arguments(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}, "common_kwargs": {"return_tensors": "pt"}}


class DeepseekVLProcessor(FromCheckpoint, ProcessorMixin):
    """Text with image tags, or messages in transformers' form, and images -> model inputs.

    Args:
        image_processor: images -> pixels.
        tokenizer: the checkpoint's tokenizer.
        chat_template: Jinja; by default the `deepseek` conversation format.
        num_image_tokens: how many features an image has.
    """

    image_token = IMAGE_TAG

    def __init__(
        self,
        image_processor: DeepseekVLImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        num_image_tokens: int = 576,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEEPSEEK_CHAT_TEMPLATE)
        self.num_image_tokens = num_image_tokens

    @property
    def image_token_id(self) -> int:
        """The image tag's token id."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepare one text or several.

        Args:
            images: of all texts in reading order; one or (nested) lists of them.
            text: with one image tag per image.
            kwargs: of the tokenizer and the image processor (`padding`, `return_tensors`, ...).

        Returns:
            `input_ids` and `attention_mask` [b, T], and with images what the image processor gives.

        Raises:
            ValueError: if there is no text, or images and tags are not equally many.
        """
        if text is None:
            raise ValueError("There is no text; images alone are the image processor's.")
        options = self._merge_kwargs(_Arguments, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        flat = flat_images(images) if images is not None else []
        tags = sum(part.count(self.image_token) for part in texts)
        if tags != len(flat):
            raise ValueError(f"The text has {tags} {self.image_token} and {len(flat)} images were given.")
        whole = [part.replace(self.image_token, self.image_token * self.num_image_tokens) for part in texts]
        data = dict(self.tokenizer(whole, **options["text_kwargs"]))
        if flat:
            data |= self.image_processor(flat, **options["images_kwargs"])
        return BatchFeature(data)

    def apply_chat_template(self, conversation: Any, *args: Any, generation_mode: str = "text", **kwargs: Any) -> Any:
        """transformers' `apply_chat_template`.

        Args:
            conversation: messages of one conversation, or a list of such.
            generation_mode: `text`, which is all that these models generate.
            args, kwargs: transformers' other arguments.

        Raises:
            ValueError: for another mode.
        """
        if generation_mode != "text":
            raise ValueError(f"generation_mode must be 'text', not {generation_mode!r}: these models write text only.")
        return super().apply_chat_template(conversation, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads the settings, which may be in the reference's layout."""
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("processor_class") == VLChatProcessor.__name__:
            require_transformers_processor(settings)
        names = ("num_image_tokens", "chat_template")
        return {name: settings[name] for name in names if name in settings}, unused

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        directory = pretrained_model_name_or_path
        settings = {"extra_special_tokens": {"image_token": cls.image_token}}  # where transformers' own class looks
        return [DeepseekVLImageProcessor.from_pretrained(directory), load_tokenizer(directory, settings)]
