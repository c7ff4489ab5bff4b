"""Where a base checkpoint comes from: a folder on this machine, or a Hub id that huggingface_hub brings into its cache.

Weights are fetched last, by name, so that a model that cannot be converted is refused before its gigabytes come.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError, HubUnreachable, UnusableSource

# everything of a repository's top folder that is not weights
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*", "README.md"]
_SMALL_FILES += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
_FOLDERS = ["original/*", "onnx/*", "*/*.json", "*/*.txt", "*/*.model"]


@dataclass(frozen=True)
class Source:
    """A base checkpoint whose small files are in `folder`; `fetch` brings more of them there."""

    given: str  # as the user wrote it
    folder: Path
    asked_revision: str | None = None
    commit: str | None = None  # of a Hub snapshot
    token: str | bool | None = None
    argument: str = "source"  # what messages call it

    def __str__(self) -> str:
        return f"`{self.argument}`={self.given!r}"

    @property
    def from_hub(self) -> bool:
        return self.commit is not None

    def fetch(self, names: Iterable[str]) -> None:
        """Bring these files into `folder`. A name that the repository lacks is left out without an error."""
        if self.commit is not None:
            # config.json is there already: with it the list always matches something, and the Hub library does not warn
            patterns = ["config.json", *(glob.escape(name) for name in names)]
            _download(self.given, self.commit, self.token, patterns, None)


def open_source(
    source: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    argument: str = "source",
) -> Source:
    """Find `source`: a local folder of that name wins, else it is taken for a Hub id.

    Raises:
        UnusableSource: no such folder, repository or revision, or no access to it.
        HubUnreachable: the Hub does not answer and the files are not in its cache.
    """
    given = os.fspath(source)
    path, label = Path(given).expanduser(), f"`{argument}`={given!r}"
    if path.is_dir():
        if revision is not None:
            raise UnusableSource(
                f"`revision`={revision!r} chooses a version on the Hub, but {label} is a local folder. "
                "Leave `revision` out, or check that version out yourself."
            )
        return Source(given, path, argument=argument)
    if path.exists():
        raise UnusableSource(f"{label} is a file. Name the folder that holds config.json and the weights.")
    if path.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1 or not given:
        raise UnusableSource(f"{label}: there is no such folder, and it cannot be a Hub id (owner/name).")
    folder = Path(_download(given, revision, token, _SMALL_FILES, _FOLDERS))
    return Source(given, folder, revision, folder.name, token, argument)


def _download(
    repo: str, revision: str | None, token: str | bool | None, patterns: list[str], ignore: list[str] | None
) -> str:
    from huggingface_hub import errors, snapshot_download

    # the HTTP library's own root error, whichever one this huggingface_hub is built on: a proxy error arrives bare
    transport_error: Any = errors.HfHubHTTPError.__mro__[1]
    try:
        return snapshot_download(
            repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignore, library_name="mhc_hf"
        )
    except errors.HFValidationError as error:
        raise UnusableSource(f"`source`={repo!r} is neither a folder here nor a Hub id: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise UnusableSource(
            f"`revision`={revision!r}: {repo} has no such branch, tag or commit on the Hub."
        ) from error
    except errors.GatedRepoError as error:
        raise UnusableSource(
            f"`source`={repo!r} is gated and this account has no access. Accept its terms on its Hub page, then log in "
            "with `hf auth login` or pass `token`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnusableSource(
            f"`source`={repo!r}: there is no such folder here, and no such model on the Hub that this account can see. "
            "Check the name; for a private model log in with `hf auth login` or pass `token`."
        ) from error
    except (OSError, transport_error) as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: BaseException) -> ConversionError:
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = (str(root).splitlines() or [""])[0][:200]
    return HubUnreachable(
        f"`source`={repo!r}: the Hub did not hand it over ({type(root).__name__}: {reason}), and the Hub cache does "
        "not have it in whole. Check the connection and HF_ENDPOINT / HF_HUB_OFFLINE and run again (a download "
        "resumes), or give a local folder."
    )
