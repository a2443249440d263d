"""The measured loss: of one model, of many plans, and of those that a search proposes."""
