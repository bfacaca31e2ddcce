"""Generates from Python, without a server: `python examples/offline.py [MODEL]`."""

import sys

from moeyard import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ""  # the small embedded checkpoint
    prompts = ["def main(", "class Queue:", "import os\n\ndef walk(path):"]
    params = SamplingParams(temperature=0.0, max_tokens=32)
    with LLM(model) as llm:
        for result in llm.generate(prompts, params):
            print(f"--- {result.prompt!r}\n{result.outputs[0].text}\n")


if __name__ == "__main__":  # the engine is a process of its own
    main()
