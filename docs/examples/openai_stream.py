"""Streams a completion with the official OpenAI client: ``python openai_stream.py [PROMPT]``."""

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
prompt = sys.argv[1] if len(sys.argv) > 1 else "def read_json(path):"
model = client.models.list().data[0].id
for piece in client.completions.create(
    model=model, prompt=prompt, max_tokens=64, temperature=0, stream=True
):
    print(piece.choices[0].text, end="", flush=True)
print()
