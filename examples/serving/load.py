"""Throughput and latency of an exported file with N clients, and whether the results under load are those alone.

python load.py digits.onnx --clients 8 --batch 8 --threads 1 --seconds 10

Clients send one image at a time and wait for the answer. Images wait in a queue that holds at most one per client; one
thread takes what is there, up to a batch, and runs it. Nothing waits for a batch to fill.
"""

import argparse
import queue
import sys
import threading
import time
from concurrent.futures import Future

import numpy as np
from classify import Classifier


class Server:
    """Batches what several threads send: `submit(image)` gives a Future of (label, probability, unknown)."""

    def __init__(self, classifier: Classifier, batch: int, waiting: int):
        self.classifier, self.batch = classifier, batch
        self.queue: queue.Queue = queue.Queue(waiting)  # full: submit waits, so that memory is bounded
        self.sizes: list[int] = []
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, image: np.ndarray) -> Future:
        future: Future = Future()
        self.queue.put((image, future))
        return future

    def _work(self) -> None:
        while True:
            taken = [self.queue.get()]
            while len(taken) < self.batch and not self.queue.empty():
                taken.append(self.queue.get())
            images, futures = zip(*taken, strict=True)
            self.sizes.append(len(images))
            try:
                for future, answer in zip(futures, self.classifier(np.stack(images)), strict=True):
                    future.set_result(answer)
            except Exception as error:  # the clients hear of it
                for future in futures:
                    if not future.done():
                        future.set_exception(error)


def measure(classifier: Classifier, clients: int, batch: int, seconds: float, seed: int = 0) -> dict[str, float]:
    """Images per second, latency percentiles in milliseconds, mean batch; share of labels equal to those alone, and the
    largest difference of a probability."""
    shape = classifier.transform["input_size"]
    images = np.random.default_rng(seed).standard_normal((64, *shape)).astype(np.float32)
    alone = [classifier(image[None])[0] for image in images]
    server, took, answers = Server(classifier, batch, clients), [], []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        at = number
        while time.perf_counter() < end:
            at, start = (at + 1) % len(images), time.perf_counter()
            answers.append((at, server.submit(images[at]).result()))
            took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = time.perf_counter() - start
    p50, p95, p99 = 1000 * np.percentile(took, [50, 95, 99])
    return {
        "images_per_second": len(took) / passed,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_batch": float(np.mean(server.sizes)),
        "equal_labels": float(np.mean([answer[0] == alone[at][0] for at, answer in answers])),
        "largest_difference": max(abs(answer[1] - alone[at][1]) for at, answer in answers),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="load.py", description=__doc__)
    parser.add_argument("file", help="an exported .onnx file")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="images that are run together, at most")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    found = measure(Classifier(given.file, given.threads), given.clients, given.batch, given.seconds)
    for name, value in found.items():
        print(f"{name:20} {value:.4g}")
    return 0 if found["equal_labels"] > 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
