"""ModelScope, through modelscope-hub: its variables MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN and MODELSCOPE_ENDPOINT.

ModelScope does not tell which commit a revision is. Its client compares each file with the checksum in the listing,
and keeps the files of a revision in one place; `quantize` notices by their content when they have changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from eightfold.errors import EightfoldError
from eightfold.hub.clients import (
    Listing,
    NotReached,
    failed,
    first_line,
    is_offline,
    missing_client,
    no_model,
    require_ours,
    require_private,
)
from eightfold.hub.names import HubId

_BRANCH = "master"
_TOKEN = "MODELSCOPE_API_TOKEN"


class ModelScope:
    """ModelScope's hub."""

    title = "ModelScope"

    def __init__(self) -> None:
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            import modelscope_hub
        except ImportError:
            raise missing_client("modelscope-hub") from None
        import logging

        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self._client = modelscope_hub
        self._config = modelscope_hub.HubConfig()  # the client would keep the first one of this process
        self._api = modelscope_hub.HubApi(config=self._config)

    def listing(self, model: HubId) -> Listing:
        if is_offline():
            raise NotReached("HF_HUB_OFFLINE is set")
        with self._errors(model):
            found = self._api.list_repo_files(model.name, "model", revision=model.revision or _BRANCH)
        return Listing(model.revision or _BRANCH, {each.path: each.size for each in found if each.type != "tree"})

    def cached(self, model: HubId) -> Path | None:
        try:
            found = self._api.download_repo(
                model.name, "model", revision=model.revision or _BRANCH, local_files_only=True
            )
        except Exception:  # whatever is missing or damaged in the cache
            return None
        return Path(found)

    def space(self, model: HubId, listing: Listing, names: Sequence[str]) -> tuple[Path, int]:
        cache = Path(self._config.cache_dir)
        home = cache / "models" / model.name.replace("/", "--") / "snapshots" / listing.revision
        return cache, sum(listing.sizes[name] for name in names if not (home / name).exists())

    def fetch(self, model: HubId, listing: Listing, names: Sequence[str]) -> Path:
        with self._errors(model):
            found = self._api.download_repo(model.name, "model", revision=listing.revision, allow_patterns=list(names))
        return Path(found)

    def publish(self, model: HubId, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
        if is_offline():
            raise NotReached("HF_HUB_OFFLINE is set")
        with self._errors(model):
            if not self._api.repo_exists(model.name, "model"):
                self._api.create_repo(model.name, "model", visibility="private" if private else "public")
            else:
                if private:
                    require_private(model, self, self._is_private(model))
                require_ours(model, self, [each.path for each in self._api.list_repo_files(model.name, "model")])
            with TemporaryDirectory() as folder:
                for name, content in files.items():
                    place = Path(folder) / name
                    place.parent.mkdir(exist_ok=True)
                    if isinstance(content, Path):
                        place.symlink_to(content.resolve())
                    else:
                        place.write_bytes(content)
                self._api.upload_folder(
                    model.name,
                    "model",
                    folder,
                    commit_message=message,
                    revision=model.revision or _BRANCH,
                    use_cache=False,  # what the hub has is not sent again: it is asked by checksums
                    sync_remote_repo=True,  # of a model that was here before, nothing is taken for a part of this one
                    disable_tqdm=not sys.stderr.isatty(),
                )
        return f"https://modelscope.cn/models/{model.name}"

    def _is_private(self, model: HubId) -> bool:
        return bool(self._api.get_repo(model.name, "model").visibility == self._client.Visibility.PRIVATE)

    @contextmanager
    def _errors(self, model: HubId) -> Iterator[None]:
        errors = self._client.errors
        try:
            yield
        except EightfoldError:
            raise
        except errors.FileDownloadError as error:
            raise self._refusal(model, next(iter(error.failed_files.values()), error)) from None
        except errors.HubError as error:
            raise self._refusal(model, error) from None
        except OSError as error:
            if error.errno is not None and not isinstance(error, ConnectionError):
                raise  # the disk's, which the command line explains
            raise NotReached(first_line(error)) from None
        except Exception as error:
            raise NotReached(first_line(error)) from None

    def _refusal(self, model: HubId, error: BaseException) -> BaseException:
        errors = self._client.errors
        if isinstance(error, errors.NotExistError):
            got = f"none of this name{f', or no revision {model.revision}' if model.revision else ''}"
            return no_model(model, self, got, f"Check the name, and set {_TOKEN} if it is private.")
        if isinstance(error, (errors.AuthenticationError, errors.PermissionDeniedError)):
            return no_model(model, self, "a gated or private one, or a token that is refused", f"Set {_TOKEN}.")
        if isinstance(error, (errors.NetworkError, errors.ServerError, errors.RateLimitError)):
            return NotReached(first_line(error))
        return failed(model, self, error)
