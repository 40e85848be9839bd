// C++ streams and file system calls, and what a cancelled thread destroys on its way out. Prints
// the same lines on an ordinary file on ext4 and on a protected file.
//
// Usage: streams_cc PATH DIRECTORY (absolute; the directory is an ordinary one).
#include <cstdio>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <pthread.h>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

static const char *path;
static std::string fifo;
static int quiet[2], ready[2];
static int destroyed;

struct Guard {
	~Guard() { destroyed++; }
};

static void tell() { (void)!write(ready[1], "r", 1); }

static void *reads(void *)
{
	Guard guard;
	char byte;
	tell();
	(void)!read(quiet[0], &byte, 1);
	return nullptr;
}

static void *reads_a_stream(void *)
{
	Guard guard;
	tell();
	fgetc(fdopen(quiet[0], "r"));
	return nullptr;
}

static void *opens(void *)
{
	Guard guard;
	tell();
	(void)!open(fifo.c_str(), O_RDONLY);
	return nullptr;
}

static void *opens_a_stream(void *)
{
	Guard guard;
	tell();
	(void)!fopen(fifo.c_str(), "r");
	return nullptr;
}

static void *reads_the_file(void *)
{
	Guard guard;
	FILE *f = fopen(path, "r");
	tell();
	for (;;) {
		rewind(f);
		while (fgetc(f) != EOF)
			;
		pthread_testcancel();
	}
}

static void cancelled(const char *what, void *(*run)(void *))
{
	pthread_t thread;
	void *result;
	char byte;
	pthread_create(&thread, nullptr, run, nullptr);
	(void)!read(ready[0], &byte, 1);
	pthread_cancel(thread);
	pthread_join(thread, &result);
	printf("%s: %s, destroyed %d\n", what, result == PTHREAD_CANCELED ? "cancelled" : "ended", destroyed);
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	setvbuf(stdout, nullptr, _IOLBF, 0);
	path = arguments[1];
	fifo = std::string(arguments[2]) + "/fifo";
	{
		std::ofstream out(path, std::ios::trunc);
		out << "one two\nthree " << 42 << "\n";
	}
	{
		std::ifstream in(path);
		for (std::string line; std::getline(in, line);)
			std::cout << line << std::endl;
	}
	{
		std::fstream both(path, std::ios::in | std::ios::out);
		both.seekp(4);
		both << "TWO";
		both.seekg(0);
		std::stringstream all;
		all << both.rdbuf();
		std::cout << all.str();
	}
	{
		std::ofstream more(path, std::ios::app);
		more << "four\n";
	}
	std::cout << std::filesystem::exists(path) << std::filesystem::file_size(path) << std::endl;
	try {
		std::ifstream none;
		none.exceptions(std::ios::failbit);
		none.open("/nonexistent/file");
	} catch (const std::exception &) {
		std::cout << "caught" << std::endl;
	}
	if (pipe(quiet) || pipe(ready) || (unlink(fifo.c_str()), mkfifo(fifo.c_str(), 0600)))
		return 3;
	cancelled("in read", reads);
	cancelled("in a stream", reads_a_stream);
	cancelled("in open", opens);
	cancelled("in fopen", opens_a_stream);
	for (int i = 0; i < 20; i++)
		cancelled("on the file", reads_the_file);
	std::ifstream in(path);
	std::string word;
	in >> word;
	std::cout << word << std::endl;
	unlink(fifo.c_str());
	puts("done");
	return 0;
}
