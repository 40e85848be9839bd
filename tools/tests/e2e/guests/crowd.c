/* crowd PATH N: N processes that are at work on PATH at the same time. Prints how many of them read
 * a block, and the errno of the first that did not. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int count = argc > 2 ? atoi(argv[2]) : 0, told[2], hold[2], worked = 0, first = 0;

	if (count < 1 || pipe(told) || pipe(hold))
		return 2;
	for (int i = 0; i < count; i++) {
		pid_t child = fork();

		if (child < 0)
			return 3;
		if (child == 0) {
			char block[4096];
			int error = 0, fd = open(argv[1], O_RDONLY);

			close(hold[1]);
			if (fd < 0 || pread(fd, block, sizeof block, 0) != sizeof block)
				error = errno ? errno : EIO;
			if (write(told[1], &error, sizeof error) != sizeof error)
				_exit(4);
			/* Until all have read: the other end is closed. */
			_exit(read(hold[0], block, 1) != 0);
		}
	}
	for (int i = 0; i < count; i++) {
		int error;

		if (read(told[0], &error, sizeof error) != sizeof error)
			return 5;
		if (error == 0)
			worked++;
		else if (first == 0)
			first = error;
	}
	close(hold[1]);
	while (wait(NULL) > 0)
		;
	printf("%d %d\n", worked, first);
	return 0;
}
