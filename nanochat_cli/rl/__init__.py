"""Learning from rewards: rollouts, rewards, the experience library, and policy updates."""
