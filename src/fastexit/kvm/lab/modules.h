/* What both inits of the lab do first: KVM's modules, in the order and with the options of /modules.
 *
 * For a file that has stdio.h, string.h, fcntl.h, unistd.h, sys/syscall.h, and a fail() that does not come back.
 */
static void load_modules(void)
{
	char line[256];
	FILE *list = fopen("/modules", "r");

	if (!list)
		fail("/modules");
	while (fgets(line, sizeof line, list)) {
		char *name = strtok(line, " \n"), *options = strtok(NULL, "\n");
		int fd = open(name, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, options ? options : "", 0))
			fail(name);
		close(fd);
	}
	fclose(list);
}
