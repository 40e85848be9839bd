/* Opens a protected file, says so, and aborts when it is told to: what is in its core dump? */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	static const char half[] = "postern-core-", rest[] = "marker";
	char *volatile marker = malloc(64);
	char block[4096];
	int fd = argc == 2 ? open(argv[1], O_RDWR) : -1;

	if (fd < 0 || !marker || pwrite(fd, "x", 1, 0) != 1 || fsync(fd) ||
	    pread(fd, block, sizeof block, 0) != (ssize_t)sizeof block) {
		perror("keyholder");
		return 1;
	}
	/* Put together here, so that it lies nowhere in the program's file; volatile, so that it is. */
	for (size_t i = 0; i < sizeof half; i++)
		((volatile char *)marker)[i] = half[i];
	for (size_t i = 0; i < sizeof rest; i++)
		((volatile char *)marker)[sizeof half - 1 + i] = rest[i];
	printf("ready\n");
	fflush(stdout);
	getchar();
	abort();
}
