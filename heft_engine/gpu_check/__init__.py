"""`gpu-check`: measures and checks the engine on one GPU, part by part, within five minutes."""
