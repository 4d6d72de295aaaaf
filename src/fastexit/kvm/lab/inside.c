/*
 * The init of a machine that runs one command of the host's: its files are in the initramfs, its output leaves by ports.
 *
 * /inside/argv, /inside/environ: strings, each with its 0. /inside/cwd: where it runs. /inside/terminal: rows and
 * columns, where it gets a terminal. /inside/fetch: files that are wanted afterwards, as strings.
 *
 * Ports: OUTPUT, ERRORS: what it writes. FILES: name\0size\0bytes of each file wanted. TELL: lines: "began", "ack" for
 * each frame of input that was taken, "exit N" at the end. The second serial line brings frames: a letter, a length,
 * bytes: 'd' input, 'e' its end, 's' a signal.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { OUTPUT = 0xe9, ERRORS, TELL, FILES, PORTS = 4 };
enum { MOST = 4096, DRAINED_MS = 200 };

/* A line that names what is missing and ends the machine: there is nobody who could mend it. */
static void fail(const char *what)
{
	printf("fastexit-init: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	tcdrain(1);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

#include "modules.h"

static void out(int port, const void *bytes, size_t count)
{
	__asm__ volatile("rep outsb" : "+S"(bytes), "+c"(count) : "d"(port) : "memory");
}

static void tell(const char *line)
{
	out(TELL, line, strlen(line));
}

/* A whole file, with a 0 behind it; NULL where there is none. */
static char *contents(const char *path, size_t *bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat found;
	char *text;
	ssize_t got;

	if (fd < 0 || fstat(fd, &found) || !(text = calloc(1, found.st_size + 1)))
		return NULL;
	for (*bytes = 0; (got = read(fd, text + *bytes, found.st_size - *bytes)) > 0;)
		*bytes += got;
	close(fd);
	return text;
}

/* Strings of a file as a list that ends with NULL. */
static char **strings(const char *path)
{
	size_t bytes = 0, count = 0;
	char *text = contents(path, &bytes), **list = calloc(bytes + 1, sizeof *list);

	if (!text || !list)
		fail(path);
	for (char *at = text; at < text + bytes; at += strlen(at) + 1)
		list[count++] = at;
	return list;
}

static void mounted(const char *kind, const char *where)
{
	mkdir(where, 0755);
	mount(kind, where, kind, 0, NULL);
}

static int open_frames(void)
{
	struct termios raw;
	int fd = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (fd < 0 || tcgetattr(fd, &raw))
		fail("/dev/ttyS1");
	cfmakeraw(&raw);
	tcsetattr(fd, TCSANOW, &raw);
	return fd;
}

/* What the command is connected to: three pipes, or one terminal for all. Ends of ours: input, output, errors. */
static void connect_it(int ours[3], int theirs[3])
{
	struct winsize size = { 0 };
	int ends[2], unlocked = 0, number;
	char *text, name[64];
	size_t bytes;

	text = contents("/inside/terminal", &bytes);
	if (!text) {
		for (int n = 0; n < 3; n++) {
			if (pipe2(ends, O_CLOEXEC))
				fail("pipe");
			theirs[n] = ends[n > 0];
			ours[n] = ends[n == 0];
		}
		return;
	}
	sscanf(text, "%hu %hu", &size.ws_row, &size.ws_col);
	ours[0] = ours[1] = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	ours[2] = -1;
	if (ours[0] < 0 || ioctl(ours[0], TIOCSPTLCK, &unlocked) || ioctl(ours[0], TIOCGPTN, &number))
		fail("/dev/ptmx");
	snprintf(name, sizeof name, "/dev/pts/%d", number);
	theirs[0] = theirs[1] = theirs[2] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (theirs[0] < 0)
		fail(name);
	ioctl(theirs[0], TIOCSWINSZ, &size);
}

static pid_t start(const int theirs[3], int terminal)
{
	char **argv = strings("/inside/argv"), **environment = strings("/inside/environ");
	size_t bytes;
	char *cwd = contents("/inside/cwd", &bytes);
	pid_t child = fork();

	if (child)
		return child;
	ioperm(OUTPUT, PORTS, 0);
	setsid();
	if (terminal)
		ioctl(theirs[0], TIOCSCTTY, 0);
	for (int n = 0; n < 3; n++)
		dup2(theirs[n], n);
	signal(SIGPIPE, SIG_DFL);
	if (cwd && chdir(cwd))
		fprintf(stderr, "%s: %s\n", cwd, strerror(errno));
	execve(argv[0], argv, environment);
	fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* Bytes from the command to a port; 0 at their end. */
static int passed_on(int fd, int port)
{
	char bytes[MOST];
	ssize_t got = read(fd, bytes, sizeof bytes);

	if (got <= 0)
		return got < 0 && (errno == EINTR || errno == EAGAIN);
	out(port, bytes, got);
	return 1;
}

static void read_all(int fd, void *bytes, size_t count)
{
	for (size_t got = 0; got < count;) {
		ssize_t part = read(fd, (char *)bytes + got, count - got);

		if (part > 0)
			got += part;
		else if (part == 0 || errno != EINTR)
			fail("/dev/ttyS1");
	}
}

/* Input that the command has not taken yet: the host sends the next when it is told so, signals whenever it wants. */
static uint8_t waiting[256];
static size_t waiting_bytes;

static void end_input(int *input, int terminal)
{
	if (terminal) {
		if (write(*input, "\4", 1) < 0)
			*input = -1;
	} else {
		close(*input);
		*input = -1;
	}
}

static void feed(int *input)
{
	ssize_t wrote = *input < 0 ? (ssize_t)waiting_bytes : write(*input, waiting, waiting_bytes);

	if (wrote < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (wrote < 0) { /* nobody reads it any more */
		close(*input);
		*input = -1;
		wrote = waiting_bytes;
	}
	waiting_bytes -= wrote;
	memmove(waiting, waiting + wrote, waiting_bytes);
	if (!waiting_bytes)
		tell("ack\n");
}

/* One frame of the host's. */
static void obey(int frames, int *input, pid_t child, int terminal)
{
	uint8_t head[2], bytes[255];

	read_all(frames, head, 2);
	read_all(frames, bytes, head[1]);
	if (head[0] == 's' && head[1]) {
		if (terminal && bytes[0] == SIGINT) /* ^C, for whoever the terminal says */
			head[1] = write(*input, "\3", 1) > 0;
		else if (child)
			kill(-child, bytes[0]);
	} else if (head[0] == 'd' && waiting_bytes + head[1] <= sizeof waiting) {
		memcpy(waiting + waiting_bytes, bytes, head[1]);
		waiting_bytes += head[1];
		feed(input);
	} else if (head[0] == 'e' && *input >= 0) {
		end_input(input, terminal);
	}
}

static void give(const char *path)
{
	char number[32];
	size_t bytes = 0;
	char *text = contents(path, &bytes);

	if (!text)
		return;
	out(FILES, path, strlen(path) + 1);
	out(FILES, number, snprintf(number, sizeof number, "%zu", bytes) + 1);
	out(FILES, text, bytes);
	free(text);
}

/* Until the command has ended and what it wrote is out; others that hold its pipes are not waited for. */
static int attend(int frames, int ours[3], pid_t child, int terminal)
{
	struct pollfd on[4] = { { frames, POLLIN, 0 }, { ours[1], POLLIN, 0 }, { ours[2], POLLIN, 0 }, { -1, POLLOUT, 0 } };
	int its = 0, status;

	for (;;) {
		int ready;
		pid_t gone;

		on[3].fd = waiting_bytes ? ours[0] : -1;
		ready = poll(on, 4, child ? 50 : DRAINED_MS);
		if (ready > 0 && on[0].revents & POLLIN)
			obey(frames, &ours[0], child, terminal);
		if (ready > 0 && on[3].fd >= 0 && on[3].revents)
			feed(&ours[0]);
		for (int n = 1; ready > 0 && n < 3; n++)
			if (on[n].fd >= 0 && on[n].revents && !passed_on(on[n].fd, n == 1 ? OUTPUT : ERRORS))
				on[n].fd = -1;
		while ((gone = waitpid(-1, &status, WNOHANG)) > 0) /* orphans come to process 1, too */
			if (gone == child) {
				its = status;
				child = 0;
			}
		if (!child && (ready == 0 || (on[1].fd < 0 && on[2].fd < 0)))
			return its;
	}
}

int main(void)
{
	int ours[3], theirs[3], frames, status, terminal = access("/inside/terminal", F_OK) == 0;
	char line[64];
	pid_t child;

	umask(022);
	mounted("devtmpfs", "/dev");
	mounted("proc", "/proc");
	mounted("sysfs", "/sys");
	mounted("tracefs", "/sys/kernel/tracing");
	mounted("devpts", "/dev/pts");
	mounted("tmpfs", "/dev/shm");
	mkdir("/tmp", 0755); /* memory, as everything is; what came along may be below it */
	chmod("/tmp", 01777);
	symlink("/proc/self/fd", "/dev/fd");
	load_modules();
	if (ioperm(OUTPUT, PORTS, 1))
		fail("ioperm");
	signal(SIGPIPE, SIG_IGN);
	frames = open_frames();
	connect_it(ours, theirs);
	tell("began\n");
	child = start(theirs, terminal);
	if (child < 0)
		fail("fork");
	for (int n = 0; n < (terminal ? 1 : 3); n++)
		close(theirs[n]);
	fcntl(ours[0], F_SETFL, O_NONBLOCK);
	status = attend(frames, ours, child, terminal);
	for (char **path = strings("/inside/fetch"); *path; path++)
		give(*path);
	snprintf(line, sizeof line, "exit %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	tell(line);
	for (;;)
		pause(); /* the host ends the machine */
}
