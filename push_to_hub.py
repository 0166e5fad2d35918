"""Publishes a trained directory as a model on the Hugging Face Hub, in one commit.

    python push_to_hub.py runs/mine/final owner/name --dry-run    # list the files and write the card, to be read first
    python push_to_hub.py runs/mine/final owner/name

Log in before with `hf auth login`, or set HF_TOKEN to a token that may write. An upload that fails leaves the repository
as it was, and the same command finishes it; weights that the Hub has already are not sent again.
"""

import argparse
import logging
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from backbones import backbone_revision
from licensing import GIVE_LICENSE, License, UnknownLicenseError, backbone_license, joint_license, write_license_files
from llm_cache import write_whole
from model_card import model_card, modifications, mteb_results
from report import METRICS, draw_layers, read_points
from repository import LOCAL, read_record

logger = logging.getLogger(__name__)

# Files of an earlier upload that go when this one does not have them: stale parts of weights, modules, figures.
REPLACED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "1_Pooling/*",
    "2_Normalize/*",
    "licenses/*",
    "figures/*",
    "NOTICE",
]
TOKEN_PATTERN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def main():
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="final/ of a training, or the training's directory")
    parser.add_argument("repo_id", metavar="owner/name", help="the repository, created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--dry-run", action="store_true", help="write the card and list the files; send nothing")
    parser.add_argument("--keep-card", action="store_true", help="send README.md as it lies there, edited by hand")
    parser.add_argument("--license", help="the licence, where it cannot be found out (the Hub's abbreviation)")
    parser.add_argument("--results", default="results/mteb", help="mteb's scores of the model, for the card")
    parser.add_argument("--sweep", default="results/sweep", help="sweeps, whose figures go into the card")
    parser.add_argument("--commit-message", default="Upload the model with hybrid-embedder")
    args = parser.parse_args()
    try:
        api = HfApi()
        directory = prepare(
            args.directory, args.repo_id, api, args.license, args.results, args.sweep, keep_card=args.keep_card
        )
        if args.dry_run:
            print_files(directory)
            print(f"The card is {directory / 'README.md'}. Nothing was sent.")
        else:
            print(push(directory, args.repo_id, api, private=args.private, commit_message=args.commit_message))
    except (ValueError, OSError, httpx2.HTTPError) as error:
        sys.exit(f"push_to_hub.py: {error}")


def prepare(
    directory: Path,
    repo_id: str,
    api: HfApi,
    license: str | None = None,
    results: str = "results/mteb",
    sweep: str = "results/sweep",
    keep_card: bool = False,
) -> Path:
    """Writes the card, the figures and the licence files into `directory` (or its `final/`), which it returns.

    Raises:
        FileNotFoundError: it is not what `train.py` leaves behind.
        UnknownLicenseError: the licence of a backbone is unknown and `license` does not give one.
        ValueError: a file holds a token or this machine's home directory.
    """
    directory = directory / "final" if (directory / "final").is_dir() else directory
    record = read_record(directory)
    joint = License(license) if license else known_license(record, api)
    if keep_card and not (directory / "README.md").exists():
        raise FileNotFoundError(f"--keep-card, but {directory} has no README.md.")
    if "llm" in record["backbones"]:
        names = {role: backbone["name"] for role, backbone in record["backbones"].items()}
        write_license_files(directory, joint, modifications(directory), names, api)
    if not keep_card:
        figures = draw_figures(directory, record, sweep)
        scores = mteb_results(results, backbone_revision(str(directory)))
        card = model_card(directory, repo_id, joint, scores, figures)
        write_whole(directory / "README.md", lambda path: path.write_text(card.content, encoding="utf-8"))
    refuse_secrets(directory, api.token)
    return directory


def known_license(record: dict, api: HfApi) -> License:
    """The licence that the backbones of a training leave the model."""
    licenses = {}
    for role, backbone in record["backbones"].items():
        if backbone.get("license"):
            licenses[role] = License(**backbone["license"])
        elif backbone["name"].startswith(LOCAL):
            raise UnknownLicenseError(f"The licence of the {role}, a local checkpoint, is unknown. {GIVE_LICENSE}")
        else:
            licenses[role] = backbone_license(backbone["name"], api)
    return joint_license(licenses)


def draw_figures(directory: Path, record: dict, sweep: str) -> list[str]:
    """The figures of sweeps with the model's backbones over its task: accuracy against the layer."""
    figures = []
    names = {role: backbone["name"] for role, backbone in record["backbones"].items()}
    for (task, recipe, split), points in read_points(sweep).items():
        some = next(iter(points.values()))[0]
        if task == record["source"] and recipe == "tuned" and some["backbones"] == names:
            path = directory / "figures" / f"{task}-{split}-accuracy"
            path.parent.mkdir(exist_ok=True)
            title = f"{task}, trained on its {split} split"
            draw_layers(points, "accuracy", METRICS["accuracy"], title, path, endings=("png",))
            figures.append(f"figures/{path.name}.png")
    return figures


def push(
    directory: Path, repo_id: str, api: HfApi, private: bool = False, commit_message: str = "Upload the model"
) -> str:
    """Uploads what [`prepare`] completed, in one commit; returns the commit's address.

    Raises:
        OSError: the Hub refused it or could not be reached; the message says what to do.
        ValueError: `repo_id` is not `owner/name`, or `private` is asked for and the repository is public.
    """
    with explained_upload_errors(repo_id):
        if "/" not in repo_id:
            raise ValueError(f"{repo_id} is not owner/name.")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public: nothing was sent. Make it private on the Hub, or leave --private."
            )
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            ignore_patterns=[".*", "*/.*"],
            delete_patterns=REPLACED,
        )
    return f"{api.endpoint}/{repo_id}/commit/{commit.oid}"


@contextmanager
def explained_upload_errors(repo_id: str):
    """Turns the Hub's and the network's errors into one that says what happened and what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError("Not logged in. Use `hf auth login`, or set HF_TOKEN to a token that may write.") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id} cannot be the name of a repository: {error}") from error
    except (HfHubHTTPError, httpx2.HTTPError, ConnectionError, RuntimeError) as error:
        # Errors while the weights are sent come inside a RuntimeError.
        cause = error.__cause__ if type(error) is RuntimeError else error
        if isinstance(cause, HfHubHTTPError):
            message = _STATUS_MESSAGES.get(cause.response.status_code, "The Hub answered {status} during the upload.")
            message = message.format(status=cause.response.status_code, repo_id=repo_id)
        elif isinstance(cause, (httpx2.HTTPError, ConnectionError)):
            message = f"The connection to the Hub failed ({type(cause).__name__})."
        else:
            raise
        raise OSError(f"{message} The repository is as it was; the same command tries again.") from error


_STATUS_MESSAGES = {
    401: "The Hub does not accept the token ({status}). Use `hf auth login`, or set HF_TOKEN to one that may write.",
    403: "The token may not write to {repo_id} ({status}): check its role, and the owner's name.",
    404: "The Hub does not know {repo_id} ({status}), or the token may not see it.",
}


def refuse_secrets(directory: Path, token: str | None):
    """Raises a ValueError if a file has a token of the Hub in it, or names this machine's home directory."""
    home = os.fsencode(Path.home())
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix not in (".safetensors", ".png"):
            content = path.read_bytes()
            if TOKEN_PATTERN.search(content) or (token and token.encode() in content):
                raise ValueError(f"{path} holds a token of the Hub. Remove it, and revoke the token.")
            if len(home) > 1 and home + b"/" in content:
                raise ValueError(f"{path} names the home directory of this machine. Remove it, then try again.")


def print_files(directory: Path):
    sizes = {
        path.relative_to(directory): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    for path, size in sizes.items():
        print(f"{size:>15,}  {path}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")


if __name__ == "__main__":
    main()
