"""Operations: worker rows, job statistics, diagnosis."""
