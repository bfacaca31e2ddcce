"""Makes the answer match a JSON schema: `moeyard serve`, then `python examples/structured.py [URL]`."""

import json
import os
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "language": {"enum": ["python", "c", "rust"]},
        "typed": {"type": "boolean"},
        "year": {"type": "integer", "minimum": 1970, "maximum": 2030},
    },
    "required": ["language", "typed", "year"],
    "additionalProperties": False,
}

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("MOEYARD_API_KEY", "none"))

completion = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "A programming language, as JSON:"}],
    max_tokens=128,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "language", "schema": SCHEMA}},
)
print(json.dumps(json.loads(completion.choices[0].message.content or "")))
