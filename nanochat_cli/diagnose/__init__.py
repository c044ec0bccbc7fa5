"""Looking before and after: does this machine work, what will a run take, what has it become."""
