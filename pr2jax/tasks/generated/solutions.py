"""Reference solutions of programming problems, each beside a plausible wrong one.

`programs` prints the source of these functions and runs them, so text and behaviour cannot part:
a function must be whole in itself (imports inside) and take and give plain values.
"""


def sum_above(numbers, bound):
    return sum(x for x in numbers if x > bound)


def sum_above_wrong(numbers, bound):
    return sum(x for x in numbers if x >= bound)


def second_largest(numbers):
    return sorted(set(numbers))[-2]


def second_largest_wrong(numbers):
    return sorted(numbers)[-2]


def sort_by_last_digit(numbers):
    return sorted(numbers, key=lambda x: (x % 10, x))


def sort_by_last_digit_wrong(numbers):
    return sorted(numbers, key=lambda x: x % 10)


def common_divisor(numbers):
    import math

    return math.gcd(*numbers)


def common_divisor_wrong(numbers):
    return min(numbers)


def count_primes(low, high):
    def prime(n):
        if n < 2:
            return False
        divisor = 2
        while divisor * divisor <= n:
            if n % divisor == 0:
                return False
            divisor += 1
        return True

    return sum(prime(n) for n in range(low, high + 1))


def count_primes_wrong(low, high):
    return sum(n > 1 and (n % 2 == 1) for n in range(low, high + 1))


def count_vowels(text):
    return sum(letter in "aeiou" for letter in text)


def count_vowels_wrong(text):
    return len({letter for letter in text if letter in "aeiou"})


def is_palindrome(text):
    return text == text[::-1]


def is_palindrome_wrong(text):
    return text[:1] == text[-1:]


def run_lengths(text):
    result, i = "", 0
    while i < len(text):
        j = i
        while j < len(text) and text[j] == text[i]:
            j += 1
        result += text[i] + str(j - i)
        i = j
    return result


def run_lengths_wrong(text):
    return "".join(letter + str(text.count(letter)) for letter in dict.fromkeys(text))


def row_sums(matrix):
    return [sum(row) for row in matrix]


def row_sums_wrong(matrix):
    return [sum(column) for column in zip(*matrix, strict=True)]


def trace_of_square(matrix):
    size = range(len(matrix))
    return sum(matrix[i][k] * matrix[k][i] for i in size for k in size)


def trace_of_square_wrong(matrix):
    return sum(matrix[i][i] ** 2 for i in range(len(matrix)))


def covered_length(intervals):
    total, end = 0, None
    for low, high in sorted(intervals):
        if end is None or low > end:
            total += high - low
            end = high
        elif high > end:
            total += high - end
            end = high
    return total


def covered_length_wrong(intervals):
    return sum(high - low for low, high in intervals)


def distance(nodes, edges):
    near = {n: [] for n in range(1, nodes + 1)}
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    steps, front, seen = 0, [1], {1}
    while front:
        if nodes in front:
            return steps
        steps += 1
        front = list({b for a in front for b in near[a] if b not in seen})
        seen.update(front)
    return -1


def distance_wrong(nodes, edges):
    return 1 if [1, nodes] in edges or [nodes, 1] in edges else 2


def components(nodes, edges):
    root = list(range(nodes + 1))
    for a, b in edges:
        while root[a] != a:
            a = root[a]
        while root[b] != b:
            b = root[b]
        root[a] = b
    return sum(root[n] == n for n in range(1, nodes + 1))


def components_wrong(nodes, edges):
    return nodes - len(edges)


def fewest_coins(coins, amount):
    best = [0] + [amount + 1] * amount
    for value in range(1, amount + 1):
        for coin in coins:
            if coin <= value:
                best[value] = min(best[value], best[value - coin] + 1)
    return best[amount] if best[amount] <= amount else -1


def fewest_coins_wrong(coins, amount):
    count = 0
    for coin in sorted(coins, reverse=True):
        count += amount // coin
        amount %= coin
    return count if amount == 0 else -1


def longest_rise(numbers):
    best = []
    for i, x in enumerate(numbers):
        best.append(1 + max((best[j] for j in range(i) if numbers[j] < x), default=0))
    return max(best)


def longest_rise_wrong(numbers):
    longest = run = 1
    for i in range(1, len(numbers)):
        run = run + 1 if numbers[i] > numbers[i - 1] else 1
        longest = max(longest, run)
    return longest


def best_stretch(numbers):
    best = here = numbers[0]
    for x in numbers[1:]:
        here = max(x, here + x)
        best = max(best, here)
    return best


def best_stretch_wrong(numbers):
    return sum(x for x in numbers if x > 0)
