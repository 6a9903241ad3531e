"""Messages and images -> model inputs, with transformers' interface."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_utils import ImageInput
from transformers.processing_utils import BatchFeature

from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.checkpoints.layout_configs import IMAGE_TAG, require_transformers_processor
from deepseek_vl.checkpoints.text_inputs import TextOptions, TextProcessor
from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.hf.image_processing import DeepseekVLImageProcessor
from deepseek_vl.models.image_processing_vlm import flat_images
from deepseek_vl.models.processing_vlm import VLChatProcessor
from deepseek_vl.utils.conversation import DEEPSEEK_CHAT_TEMPLATE


class DeepseekVLProcessor(FromCheckpoint, TextProcessor):
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
            images: the images of all texts, in reading order; one or (nested) lists of them.
            text: one text or several, with one image tag per image.
            kwargs: those of `TextOptions` (`padding`, `truncation`, ...), and settings of the image processor.

        Returns:
            `input_ids` and `attention_mask` [b, T], and with images what the image processor gives.

        Raises:
            ValueError: if there is no text, the numbers of images and tags differ, or an argument is not taken.
        """
        if text is None:
            raise ValueError("There is no text; images alone are the image processor's.")
        settings = {*vars(self.image_processor), "device"}
        of_images = {name: kwargs.pop(name) for name in list(kwargs) if name in settings}
        of_images |= kwargs.pop("images_kwargs", None) or {}
        options = TextOptions.of(kwargs, padding_side=self.tokenizer.padding_side)
        texts = [text] if isinstance(text, str) else list(text)
        flat = flat_images(images, [each.count(self.image_token) for each in texts])
        batch, each = self.text_batch(texts, flat, options)
        del batch["mm_token_type_ids"]  # these models find images by their token ids
        if used := [image for group in each for image in group]:
            tensors = options.return_tensors or "pt"
            batch.update(self.image_processor(used, return_tensors=tensors, **of_images))
        return batch

    def apply_chat_template(self, conversation: Any, *args: Any, generation_mode: str = "text", **kwargs: Any) -> Any:
        """`TextProcessor.apply_chat_template`.

        Args:
            conversation: messages of one conversation, or a list of conversations.
            generation_mode: `text`, which is all that these models generate.
            args: transformers' other arguments.
            kwargs: transformers' other arguments.

        Raises:
            ValueError: for another mode.
        """
        if generation_mode != "text":
            raise ValueError(f"generation_mode must be 'text', not {generation_mode!r}: these models write text only.")
        return super().apply_chat_template(conversation, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """The names of the model inputs that `__call__` returns."""
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
