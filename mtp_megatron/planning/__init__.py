"""What a training job will take, before it starts: the exact memory of any rank, a cost model, a schedule simulator."""
