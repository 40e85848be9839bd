/*
 * A guest that syncs and writes down what was confirmed, and a checker of what it wrote down.
 *
 *   synclog write FILE LOG BLOCKS SEED   never ends by itself: it is there to be killed
 *   synclog check FILE LOG BLOCKS
 *
 * Each block of 4096 bytes carries its number, a version, and words made of both. LOG is an
 * ordinary file; write(2) to it survives the death of the process. Its lines:
 *
 *   S block version   about to be submitted
 *   C block version   confirmed: fsync has returned after it, or a check has read it
 *
 * After any kill a block must read as one whole version: not older than the last confirmed one,
 * and one that was submitted (or zeros, if nothing was confirmed).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 4096
#define WORDS (BLOCK / 8)
#define BATCH 4

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static void die(const char *what, int number)
{
	fprintf(stderr, "synclog: %s: %s\n", what, strerror(number));
	exit(2);
}

static void fill(uint64_t *words, uint64_t block, uint64_t version)
{
	words[0] = block;
	words[1] = version;
	for (int i = 2; i < WORDS; i++)
		words[i] = mix(block * 1000003 + version * WORDS + i);
}

static void say(int log, char kind, uint64_t block, uint64_t version)
{
	char line[64];
	int length = snprintf(line, sizeof line, "%c %lu %lu\n", kind, block, version);
	if (write(log, line, length) != length)
		die("log", errno);
}

/* What LOG says of each block: last confirmed, last submitted. */
struct known {
	uint64_t confirmed, submitted;
};

static struct known *read_log(const char *path, uint64_t blocks, uint64_t *newest)
{
	struct known *known = calloc(blocks, sizeof *known);
	FILE *log = fopen(path, "r");
	char kind;
	uint64_t block, version;

	*newest = 0;
	while (log && fscanf(log, " %c %lu %lu", &kind, &block, &version) == 3) {
		if (block >= blocks || (kind != 'S' && kind != 'C'))
			die("log is not ours", EINVAL);
		uint64_t *at = kind == 'C' ? &known[block].confirmed : &known[block].submitted;
		if (version > *at)
			*at = version;
		if (version > *newest)
			*newest = version;
	}
	if (log)
		fclose(log);
	return known;
}

static void write_for_ever(int file, int log, uint64_t blocks, uint64_t seed, uint64_t version)
{
	io_context_t context = 0;
	struct iocb iocbs[BATCH], *list[BATCH];
	struct io_event events[BATCH];
	uint64_t block[BATCH], stamp[BATCH];
	void *memory;
	int answer;

	if (posix_memalign(&memory, BLOCK, BATCH * BLOCK))
		die("memory", ENOMEM);
	answer = io_setup(BATCH, &context);
	if (answer < 0)
		die("io_setup", -answer);
	for (;;) {
		/* 1 to BATCH writes to different blocks, in flight together. */
		int count = 1 + mix(seed++) % BATCH;
		uint64_t first = mix(seed++);
		for (int i = 0; i < count; i++) {
			uint64_t *words = (uint64_t *)((char *)memory + i * BLOCK);
			block[i] = (first + i) % blocks;
			stamp[i] = ++version;
			fill(words, block[i], stamp[i]);
			say(log, 'S', block[i], stamp[i]);
			io_prep_pwrite(&iocbs[i], file, words, BLOCK, block[i] * BLOCK);
			list[i] = &iocbs[i];
		}
		answer = io_submit(context, count, list);
		if (answer != count)
			die("io_submit", answer < 0 ? -answer : EIO);
		for (int got = 0; got < count; got += answer) {
			answer = io_getevents(context, 1, BATCH, events, NULL);
			if (answer < 0)
				die("io_getevents", -answer);
			for (int i = 0; i < answer; i++)
				if (events[i].res != BLOCK)
					die("a write", -(int)events[i].res);
		}
		if (fsync(file))
			die("fsync", errno);
		for (int i = 0; i < count; i++)
			say(log, 'C', block[i], stamp[i]);
	}
}

static int check(int file, int log, uint64_t blocks, const struct known *known)
{
	uint64_t expected[WORDS], *words;
	void *memory;
	int bad = 0;

	if (posix_memalign(&memory, BLOCK, BLOCK))
		die("memory", ENOMEM);
	words = memory;
	for (uint64_t block = 0; block < blocks; block++) {
		ssize_t length = pread(file, words, BLOCK, block * BLOCK);
		if (length != BLOCK)
			die("a read", length < 0 ? errno : EIO);
		uint64_t version = words[1];
		if (version == 0)
			memset(expected, 0, BLOCK);
		else
			fill(expected, block, version);
		if (memcmp(words, expected, BLOCK)) {
			printf("block %lu: torn or foreign (claims version %lu)\n", block, version);
			bad = 1;
		} else if (version < known[block].confirmed || version > known[block].submitted) {
			printf("block %lu: version %lu, confirmed %lu, submitted %lu\n", block, version,
			       known[block].confirmed, known[block].submitted);
			bad = 1;
		} else if (version) {
			/* What a recovery has shown must stay. */
			say(log, 'C', block, version);
		}
	}
	return bad;
}

int main(int count, char **words)
{
	if (count < 5)
		die("usage", EINVAL);
	uint64_t blocks = strtoull(words[4], NULL, 10), newest;
	struct known *known = read_log(words[3], blocks, &newest);
	int log = open(words[3], O_WRONLY | O_CREAT | O_APPEND, 0600);
	int file = open(words[2], O_RDWR | O_DIRECT);

	if (log < 0 || file < 0)
		die("open", errno);
	if (!strcmp(words[1], "check"))
		return check(file, log, blocks, known);
	write_for_ever(file, log, blocks, strtoull(words[5], NULL, 10), newest);
}
