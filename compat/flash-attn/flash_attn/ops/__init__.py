"""Operations around attention."""
