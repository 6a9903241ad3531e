"""Captions on Ray Data: each actor holds a model and asks about a few pictures at a time; the driver gets the rows."""

import argparse
import json
import logging
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.arguments import open_engine
from deepseek_vl.serve.batch.inputs import PictureSource, open_picture
from deepseek_vl.serve.batch.journal import row_of

logger = logging.getLogger(__name__)

LOCAL = "local"
"""Ray's name for a cluster of this machine alone, which ends with the command."""

BATCHES_PER_TASK = 4
"""The size of a task in full batches. Its rows reach the driver together, and are asked for again if its actor dies.

At its end the batch runs empty, so that smaller tasks are slower.
"""

MOST_TASKS = 10_000
"""The most tasks; with more pictures than fit into them, each task has more."""

RETRIES = 2
"""How often a task is retried when its actor has died, by another actor or the same one restarted."""

STORE_BYTES = 256 << 20
"""The size of Ray's object store on one machine, through which names of pictures and captions pass."""


class Captioner:
    """A Ray actor that loads the model once, and asks about one batch of pictures after the other.

    Args:
        args: the command line's.
        settings: how answers are generated.
    """

    def __init__(self, args: argparse.Namespace, settings: GenerationSettings):
        self._engine, self._processor = open_engine(args, args.model_path, args.max_batch)
        self._prompt, self._settings = args.prompt, settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask about the pictures of one task (pickled, by number); returns the journal's rows for them (by number)."""
        from deepseek_vl.serve.batch.caption import caption_many

        (pictures,) = map(pickle.loads, batch["pictures"])
        numbers, sources = list(pictures), list(pictures.values())
        answers = caption_many(
            self._engine.model, self._processor, sources, self._prompt, self._settings, self._engine, open_picture
        )
        # JSON: to read a pickle, the driver would have to import the network, while rows wait.
        return {"rows": [json.dumps({numbers[i]: row_of(sources[i].name, answer) for i, answer in answers})]}


def check_ray() -> None:
    """Check that Ray Data is installed.

    Raises:
        ValueError: if it is not.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray needs the package ray: pip install '.[ray]' ({error}).") from error


def caption_on_ray(
    args: argparse.Namespace, settings: GenerationSettings, pictures: Sequence[PictureSource]
) -> Iterator[dict[str, Any]]:
    """Rows about pictures as they come, from an actor per GPU of the cluster.

    Without GPUs there is an actor per `args.ray_cores` cores. If an actor or a node dies, its pictures are asked about
    again; no row is yielded twice.

    Args:
        args: the command line's; `args.ray` is the cluster's address, or "local" for this machine.

    Raises:
        OSError: if there is no such cluster or checkpoint, or pictures are left whose actors fail again and again.
    """
    import ray
    from ray.exceptions import RayError

    if args.ray == LOCAL:
        find_checkpoint(args.model_path)  # a missing checkpoint is reported once, not by every actor
    _connect(args.ray)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.max_errored_blocks = -1  # their pictures are asked about again below
        left, per_task, reason = set(range(len(pictures))), BATCHES_PER_TASK * args.max_batch, "their actors die"
        while left:
            before, has_failed = len(left), False
            try:
                dataset = _asked(args, settings, pictures, sorted(left), per_task)
                for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):  # so that none waits for others
                    rows = json.loads(batch["rows"][0])
                    for number in left.intersection(map(int, rows)):
                        left.remove(number)
                        yield rows[str(number)]
            except RayError as error:
                has_failed, reason = True, str(error).strip().splitlines()[-1]
                logger.warning("Ray has ended the run (%s); it goes on with the other pictures.", reason)
            if left and per_task == 1 and (not has_failed or len(left) == before):
                break
            per_task = 1  # so that one picture's failure is not the others'
        if left:
            raise OSError(
                f"{len(left)} pictures have no answer, as {reason}; one is {pictures[min(left)].name!r}. The same "
                "command asks about them again."
            )
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise OSError(f"There is no Ray cluster at {address!r}: {error}") from error


def _asked(
    args: argparse.Namespace,
    settings: GenerationSettings,
    pictures: Sequence[PictureSource],
    numbers: Sequence[int],
    per_task: int,
) -> Any:
    """The dataset of the answers about the pictures with these numbers; it is computed when it is read."""
    import ray
    from ray.util.annotations import RayDeprecationWarning

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    cores = min(args.ray_cores, cpus)
    actors = gpus or cpus // cores
    per_task = max(per_task, math.ceil(len(numbers) / MOST_TASKS))
    tasks = [numbers[start : start + per_task] for start in range(0, len(numbers), per_task)]
    actors = min(actors, len(tasks))
    logger.info("%d actors with %s.", actors, "a GPU each" if gpus else f"{cores} cores each")
    items = [{"pictures": pickle.dumps({number: pictures[number] for number in task})} for task in tasks]
    # A task is a block of one row, as is its result: all of its answers arrive, or none.
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    own: Any = {"num_gpus": 1} if gpus else {"num_cpus": cores}
    with warnings.catch_warnings():
        # Ray Data deprecates an actor's options in favour of its own, which it does not have yet for these two.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            Captioner,
            fn_constructor_kwargs={"args": args, "settings": settings},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            max_restarts=-1,
            max_task_retries=RETRIES,
            **own,
        )
