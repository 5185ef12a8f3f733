from search.trials.selection import finalist_count


def test_short_searches_recommend_few_schedules() -> None:
    assert [finalist_count(budget) for budget in (0, 1, 4, 10, 24, 25, 200, 10**6)] == [1, 2, 3, 4, 5, 6, 6, 6]
