"""Hugging Face, through huggingface_hub: its cache, its token (HF_TOKEN), its mirrors (HF_ENDPOINT), HF_HUB_OFFLINE.

The client sends errors of its own; all but the few named here mean that the hub was not reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

_PAGE = "https://huggingface.co"


class HuggingFace:
    """Hugging Face's hub."""

    title = "Hugging Face"

    def __init__(self) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors, utils
        except ImportError:
            raise missing_client("huggingface_hub") from None
        self._cache, self._errors_of_client, self._tqdm = constants.HF_HUB_CACHE, errors, utils.tqdm
        utils.logging.set_verbosity_error()
        self._client = huggingface_hub
        self._api = huggingface_hub.HfApi(library_name="eightfold")

    def listing(self, model: HubId) -> Listing:
        if is_offline():
            raise NotReached("HF_HUB_OFFLINE is set")
        with self._errors(model):
            found = self._api.model_info(model.name, revision=model.revision or None, files_metadata=True)
        return Listing(found.sha, {each.rfilename: each.size or 0 for each in found.siblings or ()})

    def cached(self, model: HubId) -> Path | None:
        try:
            found = self._client.snapshot_download(
                model.name, revision=model.revision or None, local_files_only=True, allow_patterns=["config.json"]
            )
        except Exception:  # whatever is missing or damaged in the cache
            return None
        return Path(found)

    def space(self, model: HubId, listing: Listing, names: Sequence[str]) -> tuple[Path, int]:
        cache = Path(self._cache)
        home = cache / f"models--{model.name.replace('/', '--')}"
        missing = [name for name in names if not (home / "snapshots" / listing.revision / name).exists()]
        begun = sum(path.stat().st_size for path in home.glob("blobs/*.incomplete"))
        return cache, max(0, sum(listing.sizes[name] for name in missing) - begun)

    def fetch(self, model: HubId, listing: Listing, names: Sequence[str]) -> Path:
        with self._errors(model):
            # By the name that was asked for, so that the cache knows it without a network; the caller compares commits.
            found = self._client.snapshot_download(
                model.name, revision=model.revision or None, allow_patterns=list(names), tqdm_class=self._bar()
            )
        return Path(found)

    def publish(self, model: HubId, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
        add, delete = self._client.CommitOperationAdd, self._client.CommitOperationDelete
        if is_offline():
            raise NotReached("HF_HUB_OFFLINE is set")
        if not self._client.get_token():
            raise no_model(model, self, "no token", "Set HF_TOKEN to one that may write.")
        with self._errors(model):
            self._api.create_repo(model.name, private=private or None, exist_ok=True)
            if private:
                require_private(model, self, bool(self._api.model_info(model.name).private))
            if model.revision:
                self._api.create_branch(model.name, branch=model.revision, exist_ok=True)
            there = self._api.list_repo_files(model.name, revision=model.revision or None)
            require_ours(model, self, there)
            # Of a model that was here before, nothing may be taken for a part of this one.
            stale = [name for name in there if name not in files and name != ".gitattributes"]
            operations = [add(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
            operations += [delete(path_in_repo=name) for name in stale]
            done = self._api.create_commit(
                model.name, operations, commit_message=message, revision=model.revision or None
            )
        return str(done.commit_url)

    def _bar(self) -> Any:
        """Return the client's progress bar, silent where nobody looks."""
        kind: Any = self._tqdm

        class Bar(kind):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or not sys.stderr.isatty()})

        return Bar

    @contextmanager
    def _errors(self, model: HubId) -> Iterator[None]:
        """Raise what the client raises in our words; its messages are pages long."""
        errors = self._errors_of_client
        try:
            yield
        except EightfoldError:
            raise
        except errors.GatedRepoError:
            got, action = "a gated one", f"Accept its terms on {_PAGE}/{model.name}, and set HF_TOKEN."
            raise no_model(model, self, got, action) from None
        except errors.RevisionNotFoundError:
            got, action = f"no revision {model.revision}", "Leave @REVISION out for the newest."
            raise no_model(model, self, got, action) from None
        except errors.RepositoryNotFoundError as error:
            raise self._not_found(model, _status(error)) from None
        except errors.HfHubHTTPError as error:
            raise self._answered(model, error, _status(error)) from None
        except OSError as error:
            if error.errno is not None:
                raise  # the disk's, which the command line explains
            raise NotReached(first_line(error)) from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise failed(model, self, error) from None
        except Exception as error:
            raise NotReached(first_line(error)) from None

    def _not_found(self, model: HubId, status: int) -> EightfoldError:
        if status == 401 and self._client.get_token():
            return no_model(model, self, "a token that is refused, or does not reach it", "Check HF_TOKEN.")
        return no_model(model, self, "none of this name", "Check the name, and set HF_TOKEN if it is private.")

    def _answered(self, model: HubId, error: BaseException, status: int) -> EightfoldError | NotReached:
        if status in (401, 403):
            return no_model(model, self, f"a token that is refused (status {status})", "Check HF_TOKEN.")
        if status >= 500 or status == 429:
            return NotReached(f"an answer with status {status}")
        return failed(model, self, ValueError(first_line(error)))


def _status(error: Any) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)
