"""A GGUF file in llama.cpp, by the bindings of the package xllamacpp: greedy decoding, one prompt at a time."""

import json
from pathlib import Path

from shadowpeft.deploy.gguf import GGUF_FILE
from shadowpeft.deploy.packages import ExportError, need


class GgufModel:
    """Runs ``model.gguf`` as :func:`shadowpeft.deploy.gguf.write_gguf` writes it.

    Args:
        path: the file, or the folder it is in.
        num_threads: of llama.cpp.
        context: tokens of prompt and answer at most.

    Raises:
        MissingPackageError: xllamacpp is not installed.
    """

    def __init__(self, path: Path | str, *, num_threads: int = 1, context: int = 512) -> None:
        runtime = need("xllamacpp", what="running a GGUF file", install="xllamacpp")
        file = Path(path)
        settings = runtime.CommonParams()
        settings.model.path = str(file / GGUF_FILE if file.is_dir() else file)
        settings.n_ctx, settings.n_parallel, settings.warmup = context, 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = num_threads
        settings.verbosity = -1
        self._server = runtime.Server(settings)

    def generate(self, ids: list[int], *, max_new_tokens: int, ignore_end: bool = False) -> str:
        """The greedy continuation of a prompt, as text, up to the file's end token unless that is to be ignored.

        Raises:
            ExportError: llama.cpp refuses the request, such as a prompt that does not fit.
        """
        limits = {"max_tokens": max_new_tokens, "ignore_eos": ignore_end}
        answer = self._server.handle_completions({"prompt": ids, "temperature": 0.0, "cache_prompt": False, **limits})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "choices" not in answer:
            raise ExportError(f"llama.cpp refused a prompt of {len(ids)} tokens: {answer.get('error', answer)}")
        return answer["choices"][0]["text"]
