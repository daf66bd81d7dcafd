"""Operations: statistics, workers that are alive, diagnoses of jobs."""
