"""A backend of one's own: it gets the ledger, resuming, scores and reports that come with llmpipe."""

from collections.abc import Iterable, Iterator

from llmpipe import BaseLLMRunner, Chunk, Request


class ShoutRunner(BaseLLMRunner):
    """Answers a prompt with the prompt, in capitals."""

    def _initialize_model(self) -> None:
        self.model = str.upper

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer requests, pulled one by one."""
        for request in requests:
            for sample in request.samples:
                text = self.model(self.prompt_text(request))
                yield Chunk(request.id, sample, text, "stop", prompt_tokens=1, completion_tokens=1)


if __name__ == "__main__":
    with ShoutRunner({"model": "shout"}) as runner:
        print(runner.generate_text("hello"))
