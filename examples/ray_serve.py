"""Serve the HTTP API on Ray Serve, with as many replicas as the load asks for; each has a model and a batch of its own.

pip install ".[serve]" "ray[serve]" && python examples/ray_serve.py --model_path tiny --max_replicas 2

Then it is at http://127.0.0.1:8000/v1. On a cluster the nodes need the package, and the model under the same path. A
replica's address is Ray's own, so `--allowed_host` and `--api_key` of the plain server are the proxy's task here.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

import ray
from ray import serve

from deepseek_vl.engine.limits import EngineLimits


def build_app() -> "object":
    """The API's ASGI application, made in the replica: the model and its engine stay there."""
    from deepseek_vl import load_pretrained_model
    from deepseek_vl.engine.engine import Engine
    from deepseek_vl.engine.settings import GenerationSettings
    from deepseek_vl.serve.api.app import create_app
    from deepseek_vl.serve.api.service import Service

    path = os.environ["DEEPSEEK_VL_MODEL"]
    tokenizer, processor, model = load_pretrained_model(path)
    return create_app(Service(Path(path).name, Engine(model, tokenizer), processor, GenerationSettings()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--address", help="of a cluster (default: this machine)")
    parser.add_argument("--max_replicas", type=int, default=4)
    parser.add_argument("--cores", type=int, default=1, help="of each replica, where there are no GPUs")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    ray.init(address=args.address)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    resources = {"num_gpus": 1} if has_gpus else {"num_cpus": args.cores}
    # A replica takes as many requests as fill its batch; if there are more for a while, Ray starts another replica.
    scaling = {
        "min_replicas": 1,
        "max_replicas": args.max_replicas,
        "target_ongoing_requests": EngineLimits.max_rows,
    }
    environment = {"env_vars": {"DEEPSEEK_VL_MODEL": args.model_path}}

    @serve.deployment(
        autoscaling_config=scaling,
        max_ongoing_requests=2 * EngineLimits.max_rows,
        ray_actor_options={**resources, "runtime_env": environment},
    )
    @serve.ingress(build_app)
    class API:
        pass

    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(API.bind())
    print(f"Serving {args.model_path} at http://{args.host}:{args.port}/v1; Ctrl-C ends it.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    serve.shutdown()


if __name__ == "__main__":
    main()
