"""What scripts that work with futures have in common."""

import time

import requests


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def submit(self, path: str, **body: object) -> str:
        return requests.post(f"{self.url}/api/v1/{path}", json=body).json()["request_id"]

    def result(self, future: str, timeout: float = 60) -> dict:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            answer = requests.post(f"{self.url}/retrieve_future", json={"request_id": future})
            if answer.status_code == 200:
                return answer.json()
            if answer.status_code != 202:
                raise RuntimeError(answer.text)
            time.sleep(0.5)
        raise TimeoutError(future)

    def train(self, model: str, chats: list) -> str:
        return self.submit("forward_backward_async", model_id=model, data=chats, loss_fn="cross_entropy")

    def step(self, model: str) -> str:
        return self.submit("optim_step_async", model_id=model, adam_params={"learning_rate": 0.001})

    def adapter(self) -> str:
        return self.result(self.submit("add_lora_async", base_model="base", rank=16, alpha=32))["model_id"]
