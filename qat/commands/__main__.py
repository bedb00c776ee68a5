"""`python -m qat.commands` is `codecllm`."""

from qat.commands import main

if __name__ == "__main__":
    main()
