"""What a training job will take, before it starts: traced memory of any rank, a cost model, a schedule simulator."""
