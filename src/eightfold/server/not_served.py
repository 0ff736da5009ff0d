"""Paths of other servers that clients of this field ask for, and what this server has in their place."""

from __future__ import annotations

_OWN = (
    "Served are POST /v1/chat/completions, /v1/completions, /v1/responses, /tokenize and /detokenize, and GET "
    "/v1/models, /health, /metrics and /openapi.json."
)
_CHAT = "Use POST /v1/chat/completions, which is OpenAI's API."
_COMPLETE = "Use POST /v1/completions, which is OpenAI's API."
_MODELS = "Use GET /v1/models."
_TEXT_ONLY = "This model reads and writes text only; it does so at /v1/chat/completions and /v1/completions."
_NO_VECTORS = (
    "This model writes text, at /v1/chat/completions and /v1/completions. Embeddings, scores and ranks need a server "
    "with a model for them."
)
_BATCH = "Nothing is kept here. Answer a file of requests with `eightfold run --input-file`."
_STATELESS = "Nothing is kept here. Use POST /v1/responses or /v1/chat/completions."

# Paths, without /v1 before them; what ends in a slash is the beginning of several.
_INSTEAD = {
    "api/chat": _CHAT,
    "api/embed": _NO_VECTORS,
    "api/embeddings": _NO_VECTORS,
    "api/generate": _COMPLETE,
    "api/ps": _MODELS,
    "api/show": _MODELS,
    "api/tags": _MODELS,
    "api/version": "Use GET /version.",
    "api/": "This is not Ollama's API but OpenAI's: use /v1/chat/completions.",
    "apply-template": "Use POST /tokenize with messages.",
    "assistants": _STATELESS,
    "assistants/": _STATELESS,
    "audio/": _TEXT_ONLY,
    "batches": _BATCH,
    "batches/": _BATCH,
    "classify": _NO_VECTORS,
    "completion": _COMPLETE,
    "conversations": _STATELESS,
    "conversations/": _STATELESS,
    "embed": _NO_VECTORS,
    "embedding": _NO_VECTORS,
    "embeddings": _NO_VECTORS,
    "engines/": _COMPLETE,
    "files": _BATCH,
    "files/": _BATCH,
    "fine_tuning/": "Models are not trained here.",
    "generate": _COMPLETE,
    "generate_stream": _COMPLETE,
    "get_model_info": _MODELS,
    "images/": _TEXT_ONLY,
    "infill": _COMPLETE,
    "info": _MODELS,
    "messages": f"This is Anthropic's API. {_CHAT}",
    "messages/": f"This is Anthropic's API. {_CHAT}",
    "moderations": "Texts are not moderated here.",
    "pooling": _NO_VECTORS,
    "props": "Use GET /v1/models and /tokenizer_info.",
    "realtime": _TEXT_ONLY,
    "rerank": _NO_VECTORS,
    "reranking": _NO_VECTORS,
    "score": _NO_VECTORS,
    "slots": "Use GET /metrics.",
    "threads": _STATELESS,
    "threads/": _STATELESS,
    "v1/": "The base URL has /v1 twice.",
    "v1beta/": f"This is Google's API. {_CHAT}",
    "v2/rerank": _NO_VECTORS,
    "vector_stores": _STATELESS,
    "videos": _TEXT_ONLY,
}


def instead(path: str) -> str:
    """Return a sentence that says what a client that asks for a path should do."""
    name = path.removeprefix("/").removeprefix("v1/")
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name.endswith("/"):
        return "Leave out the slash at the end." if name != "/" else _OWN
    return next((words for known, words in _INSTEAD.items() if known[-1] == "/" and name.startswith(known)), _OWN)
