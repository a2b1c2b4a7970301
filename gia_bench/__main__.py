"""``python -m gia_bench`` is the command ``gia-bench``."""

from gia_bench.app import main

main()
