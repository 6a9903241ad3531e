"""The measurements of `speed.py`, each run in another process: `python benchmarks/contenders.py JOB`.

A job is a JSON object with `run`, the name of a function below, and the function's arguments. Its result is printed as
a line of JSON. Functions import heavy modules themselves, so that loading is measured from the start.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from deepseek_vl.engine.generation import AnswerStream

Conversation = list[dict[str, Any]]


class Contender(Protocol):
    """The interface of loaded models that are compared."""

    model: Any

    def answer(self, messages: Conversation, tokens: int) -> dict[str, Any]:
        """Answer a conversation with at most `tokens` tokens; returns `TokenClock.read` and the `answer`."""

    def encode(self, image: "Image.Image") -> Callable[[], Any]:
        """Preprocess an image; returns a function that encodes it for the language model."""


class TokenClock:
    """Record the time of each token within a `with` block.

    Args:
        model: the model that generates; times are read when its device has finished.
    """

    def __init__(self, model: Any):
        from measuring import now

        self._now = lambda: now(model.device)

    def __enter__(self) -> "TokenClock":
        self._ticks: list[float] = []
        self._begun = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, tokens: int) -> dict[str, float | None]:
        """Seconds until the `first` of the last `tokens` tokens, and on average for `each` of the others."""
        ticks = self._ticks[-tokens:]
        return {
            "first": ticks[0] - self._begun,
            "each": (ticks[-1] - ticks[0]) / (tokens - 1) if tokens > 1 else None,
        }


class LogitsClock(TokenClock):
    """A clock that records when a model has computed the logits of a token."""

    def __init__(self, model: Any):
        super().__init__(model)
        self._head = model.get_output_embeddings()

    def __enter__(self) -> TokenClock:
        self._hook = self._head.register_forward_hook(lambda *_: self._ticks.append(self._now()))
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


class EngineClock(TokenClock):
    """A clock that records when this package's engine has a token: graphs and compiled code call no hooks."""

    def __enter__(self) -> TokenClock:
        from deepseek_vl.engine.generation import Generation

        self._advance = advance = Generation.advance

        def noting(generation: Generation, token_id: int) -> bool:
            self._ticks.append(time.perf_counter())
            return advance(generation, token_id)

        Generation.advance = noting
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        from deepseek_vl.engine.generation import Generation

        Generation.advance = self._advance


class Ours:
    """This package, as its doors use it.

    Args:
        remembers: whether the engine keeps conversations, so that a prompt may continue an earlier one.
    """

    def __init__(
        self,
        model_path: str,
        device: str,
        dtype: str,
        quantize: str | None = None,
        compiled: bool = False,
        remembers: bool = False,
    ):
        from deepseek_vl.engine.engine import Engine
        from deepseek_vl.engine.limits import EngineLimits
        from deepseek_vl.utils.io import load_pretrained_model

        tokenizer, self.processor, self.model = load_pretrained_model(model_path, device, dtype, quantize)
        self.engine = Engine(self.model, tokenizer, EngineLimits(keeps=remembers))
        if compiled:
            self.engine.compile()

    def answer(self, messages: Conversation, tokens: int) -> dict[str, Any]:
        with EngineClock(self.model) as clock:
            stream = self.stream(messages, tokens)
            answer = "".join(stream)
        return {**clock.read(stream.completion_tokens), "answer": answer}

    def stream(self, messages: Conversation, tokens: int) -> "AnswerStream":
        """The answer to a conversation, of at most `tokens` tokens."""
        from deepseek_vl.engine.generation import AnswerStream
        from deepseek_vl.engine.settings import GenerationSettings
        from deepseek_vl.serve.inference import message_images

        inputs = self.processor(conversations=messages, images=message_images(messages))
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        return AnswerStream(self.engine, inputs, GenerationSettings(max_new_tokens=tokens))

    def encode(self, image: "Image.Image") -> Callable[[], Any]:
        pixels = self.processor.image_processor(image)["pixel_values"].to(self.model.device)
        return lambda: self.model.get_image_features(pixels)


class Transformers:
    """transformers' own class, with a checkpoint in the reference's layout; weights are renamed as they are read."""

    def __init__(self, model_path: str, device: str, dtype: str):
        import torch
        import transformers

        from deepseek_vl.checkpoints.convert import weight_files
        from deepseek_vl.checkpoints.layout_configs import to_transformers
        from deepseek_vl.checkpoints.names import TRANSFORMERS, rename
        from deepseek_vl.checkpoints.read import unread_weights
        from deepseek_vl.hf import DeepseekVLProcessor
        from deepseek_vl.kernels.device import pick_device
        from deepseek_vl.models.clip_encoder import tower_fields
        from deepseek_vl.utils.io import load_json

        path = Path(model_path)
        self.processor = DeepseekVLProcessor.from_pretrained(model_path)
        images, token_id = load_json(path / "preprocessor_config.json"), self.processor.image_token_id
        config = to_transformers(load_json(path / "config.json"), images, token_id, tower_fields)
        model_class = getattr(transformers, config["architectures"][0])
        weights, _ = rename(unread_weights(weight_files(path)), TRANSFORMERS)
        self.model = model_class.from_pretrained(
            None,
            config=model_class.config_class.from_dict(config),
            state_dict=weights,
            dtype=getattr(torch, dtype),
            device_map={"": pick_device(device)},
        ).eval()

    def answer(self, messages: Conversation, tokens: int) -> dict[str, Any]:
        """As `Contender.answer`; the prompt is tokenised and its images are preprocessed before the clock starts."""
        parts = [
            {
                "role": message["role"].lower(),
                "content": [
                    *({"type": "image", "image": image} for image in message.get("images", ())),
                    {"type": "text", "text": message["content"].replace(self.processor.image_token, "")},
                ],
            }
            for message in messages[:-1]
        ]
        inputs = self.processor.apply_chat_template(
            parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        with LogitsClock(self.model) as clock:
            output = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return {**clock.read(len(new)), "answer": self.processor.decode(new, skip_special_tokens=True)}

    def encode(self, image: "Image.Image") -> Callable[[], Any]:
        pixels = self.processor.image_processor(image).to(self.model.device, self.model.dtype)
        return lambda: self.model.model.get_image_features(**pixels)


CONTENDERS: dict[str, type[Contender]] = {"ours": Ours, "transformers": Transformers}


def open_contender(name: str, **arguments: Any) -> Contender:
    """Load a model; prints `ready`, so that the parent process can time it."""
    import torch

    torch.manual_seed(0)
    contender = CONTENDERS[name](**arguments)
    print("ready", flush=True)
    return contender


def picture(seed: int, size: tuple[int, int] = (1920, 1080)) -> "Image.Image":
    """A picture of coarse noise, different for each seed."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (27, 48, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def question(processor: Any, tokens: int, images: Sequence["Image.Image"] = ()) -> Conversation:
    """A conversation of one question about some images, whose prompt has at least `tokens` tokens."""
    words = ["Describe"]
    while True:
        content = processor.image_tag * len(images) + " ".join(words)
        messages = [{"role": "User", "content": content, "images": list(images)}, {"role": "Assistant", "content": ""}]
        missing = tokens - processor(conversations=messages, images=images).input_ids.shape[1]
        if missing <= 0:
            return messages
        words += ["what"] * max(1, missing // 8)  # a word may be several tokens


def chat_processor(model_path: str) -> Any:
    """The processor that counts the tokens of prompts, so that all contenders get the same question."""
    from deepseek_vl.models import VLChatProcessor

    return VLChatProcessor.from_pretrained(model_path)


def warm_up(loaded: Contender, processor: Any) -> None:
    """Answer a short question with two tokens."""
    loaded.answer(question(processor, 1), 2)


def first_token(contender: dict[str, Any], prompt: int, answer: int) -> dict[str, Any]:
    """Measure a prompt with an image and its answer, after a warm-up: times, memory, and bytes read per token."""
    from measuring import PeakMemory

    loaded, processor = open_contender(**contender), chat_processor(contender["model_path"])
    warm_up(loaded, processor)
    messages = question(processor, prompt, [picture(1)])
    with PeakMemory(loaded.model.device) as memory:
        result = loaded.answer(messages, answer)
    return {**result, "memory": memory.bytes, "read": bytes_per_token(loaded.model)}


def llama_cpp_first_token(
    model: str, mmproj: str | None, model_path: str, prompt: int, answer: int
) -> dict[str, dict[str, Any]]:
    """Measure the same as `first_token` in llama.cpp, without the picture and, if `mmproj` is given, with it.

    The picture has the model's size already, because llama.cpp resizes differently; resizing is not measured.
    """
    import numpy as np
    from llama_cpp_peer import LlamaCpp, positions_of

    peer = LlamaCpp(Path(model), mmproj and Path(mmproj), prompt + answer + 128)
    processor = chat_processor(model_path)
    square = processor.image_processor.resize(picture(1)).transpose(1, 2, 0)

    def measure(images: Sequence["Image.Image"]) -> dict[str, Any]:
        messages = question(processor, prompt, images)
        inputs = processor(conversations=messages, images=images)
        peer.forget()
        begun = time.perf_counter()
        features = [peer.image_features(np.ascontiguousarray(square)) for _ in images]
        for part in positions_of(inputs, features):
            logits = peer.run(part)
        ticks = [time.perf_counter()]
        for _ in range(answer - 1):
            logits = peer.run([int(logits[-1].argmax())])
            ticks.append(time.perf_counter())
        each = (ticks[-1] - ticks[0]) / (answer - 1) if answer > 1 else None
        return {"first": ticks[0] - begun, "each": each, "read": Path(model).stat().st_size}

    measure([])  # a warm-up
    results = {"without the picture": measure([])}
    if mmproj is not None:
        results["with the picture"] = measure([picture(1)])
    return results


def second_turn(contender: dict[str, Any], prompt: int, follow_up: int, first_answer: str | None) -> dict[str, Any]:
    """Measure the second question about an image.

    Args:
        first_answer: the answer to the first question; None to generate it in a `ChatSession` (this package only).
    """
    is_ours = {"remembers": True} if contender["name"] == "ours" else {}
    loaded, processor = open_contender(**contender, **is_ours), chat_processor(contender["model_path"])
    warm_up(loaded, processor)
    messages = question(processor, prompt, [picture(1)])
    text = " ".join(["And"] + ["what"] * (follow_up - 1))
    if first_answer is not None:
        messages[-1]["content"] = first_answer
        messages += [{"role": "User", "content": text}, {"role": "Assistant", "content": ""}]
        return {**loaded.answer(messages, 2), "first_answer": first_answer}

    from deepseek_vl.engine.chat import ChatSession
    from deepseek_vl.engine.settings import GenerationSettings

    session = ChatSession(loaded.engine, processor, GenerationSettings(max_new_tokens=8))
    list(session.ask(messages[0]["content"], messages[0]["images"]))
    if not session.messages:
        raise SystemExit("The model answers nothing, which leaves no conversation to go on with.")
    first_answer = session.messages[-1]["content"]
    with EngineClock(loaded.model) as clock:
        list(session.ask(text))
    return {**clock.read(session.answer.completion_tokens), "first_answer": first_answer}


def text_only(contender: dict[str, Any], prompt: int, blank: bool) -> dict[str, Any]:
    """Measure the time to the first token of a prompt without images.

    Args:
        blank: whether to encode a blank image first, as the reference does, and add its time.
    """
    from measuring import now
    from PIL import Image

    loaded, processor = open_contender(**contender), chat_processor(contender["model_path"])
    warm_up(loaded, processor)
    device = loaded.model.device
    seconds = 0.0
    if blank:
        encode = loaded.encode(Image.new("RGB", (1, 1)))
        begun = now(device)
        _without_gradients(encode)
        seconds = now(device) - begun
    return {"first": seconds + loaded.answer(question(processor, prompt), 2)["first"]}


def encode(contender: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Measure the vision towers and the projector on one image."""
    from measuring import PeakMemory, fastest

    loaded = open_contender(**contender)
    run = loaded.encode(picture(1))
    with PeakMemory(loaded.model.device) as memory:
        seconds = fastest(lambda: _without_gradients(run), loaded.model.device, repeats)
    return {"seconds": seconds, "memory": memory.bytes}


def batch(contender: dict[str, Any], sizes: Sequence[int], prompt: int, caption: int) -> dict[str, Any]:
    """Measure captions of several images at once: tokens per second for each number of images."""
    from concurrent.futures import ThreadPoolExecutor

    loaded, processor = open_contender(**contender), chat_processor(contender["model_path"])
    warm_up(loaded, processor)

    def tokens_of(messages: Conversation) -> int:
        stream = loaded.stream(messages, caption)
        list(stream)
        return stream.completion_tokens

    seeds = itertools.count()

    def rate(size: int) -> float:
        questions = [question(processor, prompt, [picture(next(seeds))]) for _ in range(size)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(size) as pool:
            tokens = sum(pool.map(tokens_of, questions))
        return tokens / (time.perf_counter() - begun)

    rates = {}
    for size in sizes:
        if contender.get("compiled"):
            rate(size)  # captures the graphs for this number of rows
        rates[size] = rate(size)
    return {"rates": rates}


def load(contender: dict[str, Any]) -> dict[str, Any]:
    """Load a model and its processor, each contender from its own layout, and print `ready`."""
    if contender["name"] == "ours":
        open_contender(**contender)
        return {}
    import transformers

    path, dtype = contender["model_path"], contender["dtype"]
    architecture = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    transformers.AutoProcessor.from_pretrained(path)
    getattr(transformers, architecture).from_pretrained(path, dtype=dtype, device_map={"": contender["device"]})
    print("ready", flush=True)
    return {}


def preprocess(image_size: int, do_normalize: bool, repeats: int) -> dict[str, Any]:
    """Measure a 1080p picture to pixel values on one core, in seconds: ours, step by step, Pillow's resize alone."""
    import numpy as np
    import torch
    from measuring import fastest
    from PIL import Image
    from transformers.image_transforms import normalize, rescale

    from deepseek_vl.imaging.square import expand2square
    from deepseek_vl.models import VLMImageProcessor

    torch.set_num_threads(1)
    processor = VLMImageProcessor(image_size, do_normalize=do_normalize)
    image = picture(1)
    size = tuple(int(side / max(image.size) * image_size) for side in image.size)

    def resized() -> Image.Image:
        return image.resize(size, Image.Resampling.BICUBIC)

    def step_by_step() -> torch.Tensor:
        pixels = np.asarray(expand2square(resized(), processor.background_color)).transpose(2, 0, 1)
        pixels = rescale(pixels, processor.rescale_factor, input_data_format="channels_first")
        if do_normalize:
            mean, std = processor.image_mean, processor.image_std
            pixels = normalize(pixels, mean, std, input_data_format="channels_first")
        return torch.from_numpy(np.stack([pixels]))

    runs = {"ours": lambda: processor(image), "step by step": step_by_step, "resize": resized}
    return {name: fastest(run, torch.device("cpu"), repeats) for name, run in runs.items()}


def limits(model_path: str, device: str, prompt: int, matrix: int, memory: int) -> dict[str, Any]:
    """Measure the machine's rates, and count the operations of a prompt with an image."""
    from measuring import multiplication_rates, read_rate

    from deepseek_vl.kernels.device import pick_device

    picked = pick_device(device)
    encode, language = operations(model_path, prompt)
    return {
        "multiply": multiplication_rates(picked, matrix),
        "read": read_rate(picked, memory),
        "encode": encode,
        "first": encode + language,
    }


def operations(model_path: str, prompt: int) -> tuple[int, int]:
    """The operations to encode an image, and to run a prompt in the language model, counted without computing."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig

    config = MultiModalityConfig.from_pretrained(model_path)
    side = chat_processor(model_path).image_processor.image_size
    with torch.device("meta"):
        model = MultiModalityCausalLM(config).eval()

    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = torch.empty(1, 3, side, side)
        for module in (model.vision_model, model.aligner):
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            tensors = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
            features = functional_call(module, tensors, (features,))

    language = config.language_config
    weights = sum(weight.numel() for weight in model.get_decoder().layers.parameters() if weight.ndim == 2)
    attention = 2 * prompt**2 * language.hidden_size * language.num_hidden_layers  # half of all pairs: it is causal
    head = 2 * model.get_output_embeddings().weight.numel()  # for one token
    return counter.get_total_flops(), 2 * prompt * weights + attention + head


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that are read for each token: the language model's without its table of embeddings."""
    from deepseek_vl.kernels.quantized import QuantizedLinear
    from deepseek_vl.kernels.weight_only import stored_bytes

    modules = [*model.get_decoder().modules(), *model.get_output_embeddings().modules()]
    parameters = sum(stored_bytes(weight) for module in modules for weight in module.parameters(recurse=False))
    quantised = sum(layer.weight_bytes for layer in modules if isinstance(layer, QuantizedLinear))
    return parameters + quantised - model.get_input_embeddings().weight.nbytes


def _without_gradients(run: Callable[[], Any]) -> None:
    import torch

    with torch.inference_mode():
        run()


RUNS = {
    run.__name__: run
    for run in (
        first_token,
        llama_cpp_first_token,
        second_turn,
        text_only,
        encode,
        batch,
        load,
        preprocess,
        limits,
    )
}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(RUNS[job.pop("run")](**job)))
