"""Models of the Hugging Face Hub: only the files that are needed, kept in the Hub's own cache."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from minisd.folders import PLAIN_FIRST, Variants, needed_files
from minisd.layouts import TEXT, UNET, VAE
from minisd.sources import is_network_error


def fetch_model(repo_id: str, variants: Variants = PLAIN_FIRST) -> Path:
    """The folder of a model of the Hub in the layout of diffusers, downloaded where it is not in the cache yet, with progress bars.

    Raises `FileNotFoundError` when there is no such model or it has another layout, `ConnectionError` when nobody answers and the cache
    does not hold it, `ValueError` for what the Hub refuses; each with one sentence.
    """
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return cached_model(repo_id)
        siblings = huggingface_hub.HfApi().model_info(repo_id, timeout=10).siblings  # a missing network shows at once
        listing = [file.rfilename for file in siblings or []]
    except GatedRepoError as error:
        raise ValueError(f"{repo_id!r} on the Hub asks you to accept its terms on its page, and to sign in: `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file or folder {repo_id!r}, and no model of that name on the Hub (or a private one: `hf auth login`)."
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        return cached_model(repo_id)
    needed = needed_files(listing, variants)
    parts = {name.split("/")[0] for name in needed}
    if missing := [part for part in (UNET, VAE, TEXT) if part not in parts or not has_weights(needed, part)]:
        singles = sorted(name for name in listing if "/" not in name and name.endswith((".safetensors", ".ckpt")))
        hint = f" It has single files: download {singles[0]} and give its path." if singles else ""
        raise FileNotFoundError(f"{repo_id!r} on the Hub is no model in the layout of diffusers: nothing to load for {missing[0]}.{hint}")
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=needed))
    except GatedRepoError as error:
        raise ValueError(f"{repo_id!r} on the Hub asks you to accept its terms on its page, and to sign in: `hf auth login`.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub refused to give {repo_id!r}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise ConnectionError(
            f"the connection to the Hub broke while {repo_id!r} was downloaded; the same call goes on from there."
        ) from error


def has_weights(names: list[str], part: str) -> bool:
    """Whether weights of a part are among the files."""
    return any(name.startswith(f"{part}/") and not name.endswith("config.json") for name in names)


def cached_model(repo_id: str) -> Path:
    """What an earlier download left. Raises `ConnectionError` where that is nothing."""
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True))
    except Exception as error:
        raise ConnectionError(
            f"the Hub cannot be reached, and {repo_id!r} is not in its cache on this machine; without a network, give the path of a "
            "diffusers folder or of a .safetensors file."
        ) from error
