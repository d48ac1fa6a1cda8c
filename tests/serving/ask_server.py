"""Ask vLLM's server as docs/serving.md says: python ask_server.py URL MODEL REQUESTS.json ANSWERS.json."""

import base64
import json
import sys
from pathlib import Path

from openai import OpenAI

SCHEMA = {"type": "object", "properties": {"total": {"type": "string", "pattern": "^[0-9]{2}$"}}, "required": ["total"]}
SCHEMA |= {"additionalProperties": False}


def content(row: dict) -> list[dict]:
    """The pictures, and the text, with tags only if there are several pictures."""
    numbers = range(1, len(row["images"]) + 1) if len(row["images"]) > 1 else ()
    tags = "".join(f"<|image_{number}|>" for number in numbers)
    urls = [f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in row["images"]]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*parts, {"type": "text", "text": f"{tags}\n{row['question']}" if tags else row["question"]}]


def main() -> None:
    url, model, requests, answers = sys.argv[1:]
    client = OpenAI(base_url=url, api_key="none")
    rows = json.loads(Path(requests).read_text())
    chat = []
    for row in rows:
        extra: dict = {"return_token_ids": True, "return_tokens_as_token_ids": True, "prompt_logprobs": 20}
        if not row["images"]:
            extra["add_special_tokens"] = True
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content(row)}],
            max_tokens=16,
            temperature=0,
            logprobs=True,
            top_logprobs=20,
            extra_body=extra,
        )
        choice = answer.choices[0]
        top = [
            {entry.token.removeprefix("token_id:"): entry.logprob for entry in token.top_logprobs}
            for token in choice.logprobs.content
        ]
        prompt = [{token: entry["logprob"] for token, entry in place.items()} for place in answer.prompt_logprobs[1:]]
        chat.append(
            {
                "prompt_ids": answer.prompt_token_ids,
                "answer_ids": choice.token_ids,
                "text": choice.message.content,
                "log_probabilities": prompt + top,
            }
        )
    structured = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content(rows[0])}],
        max_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "receipt", "schema": SCHEMA, "strict": True}},
    )
    Path(answers).write_text(json.dumps({"chat": chat, "structured": structured.choices[0].message.content}))


if __name__ == "__main__":
    main()
