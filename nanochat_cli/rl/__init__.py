"""Learning from rewards: experiences, rewards, the sandbox that runs generated code, and policy updates."""
