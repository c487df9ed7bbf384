"""Two threads at one graph patch, which is no way to use it: what ThreadSanitizer must see."""

from __future__ import annotations

import threading
from contextlib import closing

from graphs import I32, N_EMBD, N_LAYER, Graph

from cmg_gguf import _core


def main() -> None:
    patch = _core.GraphPatch(N_LAYER)
    with closing(Graph()) as graph:
        index = graph.leaf("index", graph.n_rows, kind=I32)
        graph.node("set_rows", graph.leaf("cache_k_l0", N_EMBD, 16), graph.embed(), index)

        def ask() -> None:
            for _ in range(2000):
                graph.ask(patch)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
