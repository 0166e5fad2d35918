"""What the fault tests run in processes of their own.

They are children of multiprocessing's fork server, which imports `PRELOADED` once: a kill hits the work and not the imports.
Nothing may be computed when those are imported, since threads do not survive a fork.
"""

import importlib
import os
import sys

PRELOADED = [
    *("pytest", "faults_worker", "train", "evaluate_mteb", "sweep", "export_onnx", "push_to_hub", "encode_corpus"),
    *("onnxruntime.quantization", "onnxscript", "torch.onnx", "datasets.packaged_modules.json.json"),
    *("transformers.models.gemma3.modeling_gemma3", "transformers.models.roberta.modeling_roberta"),
    *("mteb.tasks", "ray.data", "sentence_transformers.sentence_transformer.modules"),
]


def run(function: str, arguments: list, log: str):
    """Calls a function of this module as the head of a process group of its own, its output in the file `log`."""
    import torch

    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    globals()[function](*arguments)


def command(module: str, *arguments: str):
    """The kit's command `python MODULE.py ARGUMENTS`."""
    sys.argv = [f"{module}.py", *arguments]
    importlib.import_module(module).main()


def upload(url: str, token: str, *arguments: str):
    """`push_to_hub.py ARGUMENTS` against the Hub at `url`."""
    import huggingface_hub.constants

    huggingface_hub.constants.ENDPOINT = url
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    os.environ["HF_TOKEN"] = token
    command("push_to_hub", *arguments)


def cache_states(llm: str, layers: list[int], texts: list[str], directory: str):
    """Fills a cache, in many small shards."""
    from transformers import AutoTokenizer

    import llm_cache
    from modeling_hybrid import HybridModel

    llm_cache.TOKENS_PER_SHARD = 200
    llm_cache.suitable_tokens_per_batch = lambda device: 100
    model = HybridModel.from_backbones(llm, None, llm_layers=layers)
    cache = llm_cache.LLMStateCache(directory, {"llm": "tiny"}, layers)
    cache.fill(model, AutoTokenizer.from_pretrained(llm), texts, max_length=64)
