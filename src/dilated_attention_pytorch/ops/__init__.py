"""Operations with interchangeable backends."""
