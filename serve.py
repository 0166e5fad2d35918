"""Serves an embedding model behind an OpenAI-compatible endpoint, with LitServe.

    python serve.py runs/mine/final --port 8000
    curl localhost:8000/v1/embeddings -H 'content-type: application/json' -d '{"model": "mine", "input": ["A text."]}'

Any client of OpenAI's embeddings works: `OpenAI(base_url="http://localhost:8000/v1", api_key="none")`. Send many texts in
one request: they are embedded together, and requests one after the other (LitServe merges only those of a single text).
"""

import argparse
import sys

import litserve
from fastapi import HTTPException
from sentence_transformers import SentenceTransformer

from backbones import explained_load_errors, resolve_backbone
from encoding import encode


class EmbeddingAPI(litserve.LitAPI):
    """What runs in each of LitServe's worker processes.

    Args:
        model: a SentenceTransformer directory or Hub id, with `revision` of the latter.
    """

    def __init__(self, model: str, revision: str | None):
        super().__init__(spec=litserve.OpenAIEmbeddingSpec())
        self.name, self.revision = model, revision

    def setup(self, device):
        with explained_load_errors(self.name):
            self.model = SentenceTransformer(
                resolve_backbone(self.name), revision=self.revision, trust_remote_code=True, device=device
            )

    def decode_request(self, request, context) -> list[str]:
        """The request's texts.

        Raises:
            HTTPException: 400, where they are not texts or other dimensions are asked for.
        """
        texts = request.ensure_list()
        if request.dimensions not in (None, self.model.get_embedding_dimension()):
            raise HTTPException(400, f"The model has {self.model.get_embedding_dimension()} dimensions, no others.")
        for text in texts:
            if not isinstance(text, str):
                raise HTTPException(400, "`input` must be a string or strings: tokens are not taken.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise HTTPException(400, "`input` holds half of a surrogate pair, which is not text.")
        if texts:
            tokens = self.model.tokenizer(texts, truncation=True, max_length=self.model.max_seq_length)["input_ids"]
            context["prompt_tokens"] = context["total_tokens"] = sum(map(len, tokens))
        return texts

    def predict(self, texts: list[str]) -> list[list[float]]:
        return encode(self.model, texts).tolist()

    def encode_response(self, output, context) -> dict:
        return {"embeddings": output, **context}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a SentenceTransformer directory or Hub id")
    parser.add_argument("--revision", help="commit, branch or tag of a model on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes a GPU, or on the CPU")
    args = parser.parse_args()
    server = litserve.LitServer(EmbeddingAPI(args.model, args.revision), workers_per_device=args.workers)
    try:
        server.run(host=args.host, port=args.port, generate_client_file=False)
    except (ValueError, OSError) as error:
        sys.exit(f"serve.py: {error}")


if __name__ == "__main__":
    main()
