"""Programs that a folder of their own lets Python start by path, as the processes of a run on several GPUs are."""
