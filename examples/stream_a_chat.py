"""Talk to a model: OpenAI's messages in, text out as it is generated."""

from llmpipe import LLMRunnerFactory

messages = [{"role": "system", "content": "You are a helpful assistant."}]

with LLMRunnerFactory.create_runner({"backend": "llama.cpp", "model_path": "bundled"}) as runner:
    for question in ("What is the opposite of hot?", "What is 7 + 8?"):
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        answer = ""
        for chunk in runner.create_chat_completion(messages, stream=True, temperature=0, max_tokens=30):
            text = chunk["choices"][0]["delta"].get("content") or ""
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})
