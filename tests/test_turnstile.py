import asyncio

from api.turnstile import Turnstile


async def test_the_first_passes_at_once() -> None:
    turnstile = Turnstile()
    waiting = turnstile.passed()
    try:
        waiting.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for nobody")


async def test_of_many_one_passes_in_each_turn_of_the_loop_in_their_order() -> None:
    turnstile, turn, passed = Turnstile(), 0, list[tuple[int, int]]()

    async def come(number: int) -> None:
        await turnstile.passed()
        passed.append((turn, number))

    coming = [asyncio.create_task(come(number)) for number in range(5)]
    while not all(task.done() for task in coming):
        await asyncio.sleep(0)
        turn += 1
    assert [number for _, number in passed] == list(range(5))
    turns = [turn for turn, _ in passed]
    assert turns == sorted(set(turns)), "no two in one turn"


async def test_one_that_does_not_wait_any_more_costs_the_others_no_turn() -> None:
    turnstile = Turnstile()
    tasks = [asyncio.create_task(turnstile.passed()) for _ in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[2].cancel()
    await asyncio.wait(tasks, timeout=2)
    assert tasks[3].done()
    assert not tasks[3].cancelled()
    await turnstile.passed()
