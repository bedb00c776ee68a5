"""One folder an operation: naive.py says what it computes, triton.py how, op.py picks the backend."""
